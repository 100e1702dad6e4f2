"""A schedule of divergences on real ranks: forward KL for the first steps, then another one; a
function of the step alone, so that a resumed training goes on with the same."""

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.ranks import RankGroup
from helpers.training import train_and_tell, with_student
from helpers.world import TinyWorld
from stillhouse.student.job import TrainJob

Ranks = dict[int, RankGroup]
STUDENT = {
    "divergence": "reverse_kl",
    "forward_kl_steps": 2,
    "gradient_clip": 1e-3,
    "max_steps": 4,
    "zero_stage": 2,
    "init": "config",
    "micro_batch_sequences": 3,
}
TARGET = {"k": 8, "tail_draws": 12, "temperature": 0.1}


def test_forward_kl_teaches_the_first_steps_and_the_divergence_the_others_across_a_resume(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path: Path
) -> None:
    plan = tiny_world.plan(tmp_path, target=TARGET, student=STUDENT)
    tiny_world.fill_store(plan)
    job: TrainJob = plan.jobs[0]
    whole = rank_groups[2].call(train_and_tell, job)[0]
    assert [event.clipped for event in whole] == [True] * 4
    assert [event.max_log_ratio for event in whole] == [None] * 4  # its draws have no weights

    # the same up to the switch, and not behind it
    forward = with_student(job, divergence="forward_kl", forward_kl_steps=0)
    of_forward = rank_groups[2].call(train_and_tell, replace(forward, total_steps=3))[0]
    assert [event.loss for event in whole[:2]] == [event.loss for event in of_forward[:2]]
    assert whole[2].loss != pytest.approx(of_forward[2].loss, rel=1e-2)

    # stopped before the switch, and resumed on one rank
    parted = replace(job, run_dir=tmp_path / "parted")
    rank_groups[2].call(train_and_tell, replace(parted, total_steps=1))
    rest = rank_groups[1].call(train_and_tell, parted)[0]
    assert [event.loss for event in rest] == pytest.approx([e.loss for e in whole[1:]], rel=1e-4)
