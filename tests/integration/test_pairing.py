"""One bucket of a flat teacher is refused before the first step, on real ranks and by the command;
a sharp teacher's is learnt from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.command import as_toml, stillhouse
from helpers.ranks import RankGroup
from helpers.training import refusal_of, train_and_tell
from helpers.world import TinyWorld, merged
from stillhouse.logits import decode
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore
from stillhouse.student.job import TrainJob
from stillhouse.tracking import EndEvent, TrainEvent, read_journal

Ranks = dict[int, RankGroup]
FLAT = {"k": 8, "tail_draws": 12}
STUDENT = {
    "divergence": "jsd",
    "max_steps": 4,
    "zero_stage": 2,
    "init": "config",
    "micro_batch_sequences": 3,
}
SHARP = {"k": 8, "tail_draws": 12, "temperature": 0.1}


def plan_of(
    tiny_world: TinyWorld, run_dir: Path, *, target: dict[str, Any], **student: Any
) -> Plan:
    """A plan of four steps whose chunks are all in its store."""
    plan = tiny_world.plan(run_dir, target=target, student=STUDENT | student)
    tiny_world.fill_store(plan)
    return plan


def job_of(
    tiny_world: TinyWorld, run_dir: Path, *, target: dict[str, Any], **student: Any
) -> TrainJob:
    return plan_of(tiny_world, run_dir, target=target, **student).jobs[0]


def mass_of_the_first_batch(job: TrainJob) -> float:
    """What the kept entries hold, from the store's records."""
    store = ChunkStore(job.store_url, job.recipe)
    rows = [
        divmod(int(sequence), job.recipe.chunk_sequences) for sequence in job.order.sequences(0)
    ]
    records = [torch.from_numpy(store.fetch_rows(chunk, [row]).targets_NB) for chunk, row in rows]
    return (
        decode(torch.cat(records), job.recipe.spec)
        .logprobs_TK.double()
        .exp()
        .sum(dim=1)
        .mean()
        .item()
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_bucket_of_a_flat_teacher_is_refused_on_every_rank_before_the_first_step(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path: Path, world_size: int
) -> None:
    job = job_of(tiny_world, tmp_path, target=FLAT)
    mass = mass_of_the_first_batch(job)
    assert 0.1 < mass < 0.7
    refusals = rank_groups[world_size].call(refusal_of, job)
    assert len(set(refusals)) == 1
    assert 'student.divergence is "jsd"' in refusals[0]
    assert f"hold {mass:.1%} of the teacher's mass, wanted at least 80%" in refusals[0]
    assert not Path(job.checkpoints).exists() or not list(Path(job.checkpoints).iterdir())


def test_a_sharp_teacher_is_learnt_from_through_one_bucket(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path: Path
) -> None:
    job = job_of(tiny_world, tmp_path, target=SHARP)
    assert mass_of_the_first_batch(job) > 0.9
    assert [row.step for row in rank_groups[2].call(train_and_tell, job)[0]] == [1, 2, 3, 4]


def test_a_config_that_wants_one_bucket_gets_it_and_a_begun_training_is_not_asked_again(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path: Path
) -> None:
    wanted = job_of(tiny_world, tmp_path, target=FLAT, tail_as_bucket=True)
    assert [
        row.step for row in rank_groups[2].call(train_and_tell, replace(wanted, total_steps=2))[0]
    ] == [1, 2]
    silent = replace(wanted, section=wanted.section.model_copy(update={"tail_as_bucket": False}))
    assert [row.step for row in rank_groups[2].call(train_and_tell, silent)[0]] == [3, 4]


@pytest.mark.usefixtures("ray_cluster")
def test_the_command_ends_as_a_users_mistake_before_any_step(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path / "run", target=FLAT)
    config = tmp_path / "config.toml"
    config.write_text(as_toml(merged(tiny_world.values, {"target": FLAT, "student": STUDENT})))
    refused = stillhouse("train", config, "--run-dir", plan.run_dir, cache=tmp_path)
    assert refused.code == 2, refused
    assert "student.tail_as_bucket = true" in refused.err
    rows = read_journal(plan.run_dir / "journal.jsonl")
    assert not [row for row in rows if isinstance(row, TrainEvent)]
    assert [row.outcome for row in rows if isinstance(row, EndEvent)] == ["failed"]
