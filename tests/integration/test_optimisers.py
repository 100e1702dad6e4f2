"""Other forms of the optimiser on two real ranks: the same training, up to rounding, and the same
bits after a resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from helpers.models import make_model
from helpers.ranks import RankGroup
from helpers.swapping import train_swapped
from helpers.training import train_and_tell, with_student
from helpers.world import TinyWorld
from stillhouse.student.job import TrainJob
from stillhouse.tracking import TrainEvent

Ranks = dict[int, RankGroup]
STUDENT = {"learning_rate": 3e-3, "min_learning_rate": 3e-3, "warmup_steps": 0, "max_steps": 4}


@pytest.fixture(scope="module")
def job(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    plan = tiny_world.plan(tmp_path_factory.mktemp("optimisers"), student=STUDENT)
    tiny_world.fill_store(plan)
    return plan.jobs[0]


@pytest.fixture(scope="module")
def plain(job: TrainJob, rank_groups: Ranks) -> list[TrainEvent]:
    rows: list[TrainEvent] = rank_groups[2].call(train_and_tell, with_student(job, zero_stage=2))[0]
    return rows


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 1, "fused_adamw": True, "overlap_comm": True},
        {"zero_stage": 2, "offload": "cpu"},
    ],
)
def test_fused_overlapped_and_offloaded_optimisers_train_alike_and_resume_bit_for_bit(
    job: TrainJob,
    rank_groups: Ranks,
    plain: list[TrainEvent],
    changes: dict[str, Any],
    tmp_path: Path,
) -> None:
    mine = replace(with_student(job, **changes), run_dir=tmp_path / "whole")
    whole = rank_groups[2].call(train_and_tell, mine)[0]
    assert [row.loss for row in whole] == pytest.approx([row.loss for row in plain], rel=1e-5)
    parts = replace(mine, run_dir=tmp_path / "parts")
    first = rank_groups[2].call(train_and_tell, replace(parts, total_steps=2))[0]
    second = rank_groups[2].call(train_and_tell, parts)[0]
    assert [row.step for row in second] == [3, 4]
    assert [row.loss for row in first + second] == [row.loss for row in whole]


def test_states_on_a_disk_are_in_checkpoints_and_resume_bit_for_bit(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path: Path
) -> None:
    """Of a student whose matrices are swapped, and whose gains are too small to be."""
    like = AutoConfig.from_pretrained(tiny_world.folder / "student")
    model = make_model(tmp_path / "student", vocab_size=like.vocab_size, hidden_size=256)
    plan = tiny_world.plan(tmp_path / "run", student=STUDENT | {"model": str(model)})
    tiny_world.fill_store(plan)
    disk = tmp_path / "disk"
    swapped: dict[str, Any] = {"zero_stage": 3, "offload": "nvme", "offload_path": str(disk)}

    def trained(name: str, num_ranks: int = 2, num_steps: int = 4, **changes: Any) -> list[float]:
        job = with_student(plan.jobs[0], **changes)
        job = replace(job, run_dir=tmp_path / name, total_steps=num_steps)
        rows: list[TrainEvent] = rank_groups[num_ranks].call(train_swapped, job)[0]
        return [row.loss for row in rows]

    whole = trained("whole", **swapped)
    assert whole == trained("memory", zero_stage=3, offload="cpu")
    assert trained("parts", num_steps=2, **swapped) == whole[:2]
    assert trained("parts", num_steps=3, **swapped) == whole[2:3]
    assert trained("parts", num_ranks=1, **swapped) == pytest.approx(whole[3:], rel=1e-5)
    assert not any(disk.iterdir())
