"""What ranks say to one another beside tensors arrives as it was said, and nothing of it is a
pickle: ours, DeepSpeed's or torch's."""

from dataclasses import replace
from pathlib import Path

from helpers import peers
from helpers.ranks import RankGroup
from helpers.training import train_and_tell, with_student
from helpers.world import TinyWorld

Ranks = dict[int, RankGroup]
VALUE = {
    "text": "größer, \u2028, 🥃",
    "numbers": [0, -1, 2**53, 1764331200.1234567, 1e-300],
    "nothing": None,
    "nested": [[], {}, [True]],
}


def test_what_is_said_arrives_on_every_rank(rank_groups: Ranks) -> None:
    for num_ranks, group in rank_groups.items():
        everybody = [{"rank": rank, "value": VALUE} for rank in range(num_ranks)]
        assert group.call(peers.exchange, VALUE) == [(everybody, everybody[0])] * num_ranks


def test_an_error_arrives_with_its_kind_and_its_words(rank_groups: Ranks) -> None:
    wanted = ["str: done", "StoreUnavailable: rank 1's store is away: “später”"]
    assert rank_groups[2].call(peers.fail_each_in_its_own_way) == [wanted, wanted]


def test_a_training_opens_no_object_of_a_peer(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path: Path
) -> None:
    """It begins on one rank, and two go on, first from a converted checkpoint; at stage 3 DeepSpeed
    has most to talk about."""
    plan = tiny_world.plan(
        tmp_path, student={"checkpoint_every_steps": 100, "ce_weight": 0.25, "init": "config"}
    )
    tiny_world.fill_store(plan)
    job = replace(with_student(plan.jobs[0], zero_stage=3), total_steps=1)
    rank_groups[1].call(train_and_tell, job)
    for total_steps in (2, 3):
        assert rank_groups[2].call(
            peers.train_without_objects, replace(job, total_steps=total_steps)
        ) == [True, True]


def test_a_summons_that_one_rank_knows_of_is_heeded_by_all(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path: Path
) -> None:
    plan = tiny_world.plan(
        tmp_path, student={"checkpoint_every_steps": 100, "ce_weight": 0.25, "init": "config"}
    )
    tiny_world.fill_store(plan)
    first, second = rank_groups[2].call(
        peers.train_until_rank_1_is_summoned, with_student(plan.jobs[0], zero_stage=1)
    )
    assert first == (False, [("explain", "notice", "a machine: “weg”")])
    assert second == (False, [])
