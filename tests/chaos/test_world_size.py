"""Ranks come and go: whoever is left goes on with the same batches, the same rates and the same
weights. All on real DeepSpeed engines."""

from dataclasses import replace

import boto3
import pytest

from helpers.ranks import RankGroup
from helpers.training import train_and_tell, with_student
from helpers.world import TinyWorld
from stillhouse.checkpoint.manifest import tag_of
from stillhouse.store.object_store import Blobs
from stillhouse.student.job import TrainJob
from stillhouse.tracking import TrainEvent

Ranks = dict[int, RankGroup]


@pytest.fixture(scope="module")
def job(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    student = {
        "micro_batch_sequences": 3,
        "ce_weight": 0.25,
        "weight_decay": 1.0,
        "init": "config",
        "keep_checkpoints": 9,
    }
    plan = tiny_world.plan(tmp_path_factory.mktemp("run"), student=student)
    tiny_world.fill_store(plan)
    return plan.jobs[0]


def lose_after(job: TrainJob, step: int) -> None:
    """Leave what a group that was killed soon after its commit of `step` would leave."""
    blobs = Blobs(job.checkpoints)
    for name in blobs.names():
        if name > f"{tag_of(step)}.json":
            blobs.delete(name)


def gap(ours: list[TrainEvent], theirs: list[TrainEvent], *, since: int) -> float:
    """The largest relative difference of losses; rates, steps and numbers of tokens have to be the
    same."""
    theirs = theirs[since:]
    assert [(row.step, row.learning_rate, row.num_tokens) for row in ours] == [
        (row.step, row.learning_rate, row.num_tokens) for row in theirs
    ]
    return max(abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(ours, theirs, strict=True))


CASES = [
    *((stage, "float32", 1e-6) for stage in (1, 2, 3)),
    pytest.param(0, "float32", 1e-6, marks=pytest.mark.long_form),
    pytest.param(
        1, "bfloat16", 1e-4, marks=pytest.mark.long_form
    ),  # it has an optimiser of its own at stage 1
]


@pytest.mark.parametrize(("stage", "dtype", "tolerance"), CASES)
def test_two_ranks_then_one_then_two_lose_what_two_ranks_lose(
    job: TrainJob, rank_groups: Ranks, stage: int, dtype: str, tolerance: float
) -> None:
    cut = with_student(job, zero_stage=stage, dtype=dtype)
    if stage == 3:  # each machine downloads what it needs, and converts that
        boto3.client("s3").create_bucket(Bucket="world-size")
        cut = replace(
            cut, section=cut.section.model_copy(update={"checkpoint_url": "s3://world-size"})
        )
    steady = rank_groups[2].call(train_and_tell, cut)[0]
    assert len(steady) == 50
    lose_after(cut, 20)
    shrunk = rank_groups[1].call(train_and_tell, cut)[0]
    assert gap(shrunk, steady, since=20) <= tolerance
    lose_after(cut, 30)
    grown = rank_groups[2].call(train_and_tell, cut)[0]
    assert gap(grown, steady, since=30) <= tolerance
