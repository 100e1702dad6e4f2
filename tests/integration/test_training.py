"""Training is the same training however it is cut: ZeRO stage, ranks, micro-batches, stops and
starts. All on real DeepSpeed engines."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.damage import read_only
from helpers.ranks import RankGroup
from helpers.training import (
    first_gradients,
    loss_of_step,
    phases_at_rows,
    refuse_outage,
    train_and_tell,
    train_until_told,
    with_student,
)
from helpers.world import TinyWorld
from stillhouse.checkpoint.choice import newest_step
from stillhouse.checkpoint.fence import owner_key
from stillhouse.cluster.heartbeat import Heard, Heartbeat, StopRequest
from stillhouse.errors import CheckpointError, StudentError
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.store.object_store import Blobs
from stillhouse.student.export import export
from stillhouse.student.job import TrainJob
from stillhouse.student.watchdog import stalled
from stillhouse.tracking import CheckpointEvent, TrainEvent

Ranks = dict[int, RankGroup]
# ZeRO stage, ranks, micro-batch; 3 does not divide the batch of 8
CUTS = list(itertools.product((0, 1, 2, 3), (1, 2), (2, 3)))


@pytest.fixture(scope="module")
def job(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    plan = tiny_world.plan(
        tmp_path_factory.mktemp("run"),
        student={"checkpoint_every_steps": 100, "ce_weight": 0.25, "init": "config"},
    )
    tiny_world.fill_store(plan)
    return plan.jobs[0]


@pytest.fixture(scope="module")
def reference(job: TrainJob, rank_groups: Ranks) -> list[TrainEvent]:
    whole = with_student(job, zero_stage=0, micro_batch_sequences=8)
    rows: list[TrainEvent] = rank_groups[1].call(train_and_tell, whole)[0]
    return rows


def relative_gap(ours: list[TrainEvent], theirs: list[TrainEvent]) -> float:
    assert [row.step for row in ours] == [row.step for row in theirs]
    return max(abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(ours, theirs, strict=True))


def test_the_student_learns(reference: list[TrainEvent]) -> None:
    assert len(reference) == 50
    # the draws' part of it does not fall to 0: it has the tail's own entropy
    assert reference[-1].loss < reference[0].loss - 0.15


@pytest.mark.parametrize(("stage", "ranks", "micro_batch"), CUTS)
def test_fifty_steps_lose_the_same_however_they_are_cut(
    job: TrainJob,
    reference: list[TrainEvent],
    rank_groups: Ranks,
    stage: int,
    ranks: int,
    micro_batch: int,
) -> None:
    cut = with_student(job, zero_stage=stage, micro_batch_sequences=micro_batch)
    cut = replace(cut, run_dir=cut.run_dir / str(ranks))
    rows = rank_groups[ranks].call(train_and_tell, cut)[0]
    assert relative_gap(rows, reference) <= 1e-6


@pytest.mark.parametrize(("stage", "ranks", "micro_batch"), CUTS)
def test_gradients_are_the_same_however_they_are_cut(
    job: TrainJob,
    whole_gradients: dict[str, torch.Tensor],
    rank_groups: Ranks,
    stage: int,
    ranks: int,
    micro_batch: int,
) -> None:
    """Adam hides a wrong constant in the gradient from every loss curve: so look at the gradients
    themselves."""
    gradients = rank_groups[ranks].call(
        first_gradients, with_student(job, zero_stage=stage, micro_batch_sequences=micro_batch)
    )[0]
    assert gradients.keys() == whole_gradients.keys()
    for name, expected in whole_gradients.items():
        torch.testing.assert_close(
            gradients[name], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item(), msg=name
        )


def test_a_group_that_is_told_to_leave_commits_first_whatever_its_clock_shows(
    job: TrainJob, rank_groups: Ranks
) -> None:
    leaving = replace(job, run_dir=job.run_dir / "leaving")
    (done, rows), (theirs_done, _) = rank_groups[2].call(
        train_until_told, leaving, StopRequest("notice", 60.0, "aws: terminate"), 3
    )
    assert not done
    assert not theirs_done
    assert [row.step for row in rows if isinstance(row, TrainEvent)] == [1, 2, 3]
    assert [row.step for row in rows if isinstance(row, CheckpointEvent)] == [3]


def test_a_rank_whose_row_waits_for_room_is_not_taken_for_one_that_hangs(
    job: TrainJob, rank_groups: Ranks, tmp_path: Path
) -> None:
    phases = rank_groups[1].call(phases_at_rows, replace(job, total_steps=3, run_dir=tmp_path))[0]
    assert len(phases) == 3
    for phase in phases:
        waiting = Heartbeat("student", 0, 1, "here", pid=1, step=3, phase=phase, phase_s=1000.0)
        assert stalled([Heard(waiting, ago_s=1.0)], patience_s=60.0) is None


@pytest.fixture(scope="module")
def whole_gradients(job: TrainJob, rank_groups: Ranks) -> dict[str, torch.Tensor]:
    whole = with_student(job, zero_stage=0, micro_batch_sequences=8)
    gradients: dict[str, torch.Tensor] = rank_groups[1].call(first_gradients, whole)[0]
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    return gradients


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_a_resumed_run_is_bit_identical(
    job: TrainJob, rank_groups: Ranks, stage: int, ranks: int, tmp_path: Path
) -> None:
    steady = replace(
        with_student(job, zero_stage=stage, min_learning_rate=job.section.learning_rate),
        total_steps=12,
    )
    whole = rank_groups[ranks].call(train_and_tell, replace(steady, run_dir=tmp_path / "whole"))[0]
    stopped = replace(steady, run_dir=tmp_path / "stopped")
    first = rank_groups[ranks].call(train_and_tell, replace(stopped, total_steps=7))[0]
    second = rank_groups[ranks].call(train_and_tell, stopped)[0]
    assert [row.step for row in second] == [8, 9, 10, 11, 12]
    assert [(row.loss, row.grad_norm) for row in first + second] == [
        (row.loss, row.grad_norm) for row in whole
    ]


def test_a_flipped_bit_in_a_checkpoint_means_the_commit_before_it(
    job: TrainJob, rank_groups: Ranks, tmp_path: Path
) -> None:
    steady = replace(
        with_student(job, min_learning_rate=job.section.learning_rate),
        run_dir=tmp_path,
        total_steps=8,
    )
    steady = replace(
        steady, section=steady.section.model_copy(update={"checkpoint_every_steps": 4})
    )
    whole = rank_groups[1].call(train_and_tell, steady)[0]
    newest = max(Path(steady.checkpoints).glob("step-00000008.*/*optim*"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    again = rank_groups[1].call(train_and_tell, replace(steady, total_steps=8))[0]
    assert [(row.step, row.loss) for row in again] == [(row.step, row.loss) for row in whole[4:]]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"zero_stage": 3}, "zero_stage: found 1, wanted 3"),
        ({"seed": 7}, "seed: found 0, wanted 7"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_on_every_rank(
    job: TrainJob, rank_groups: Ranks, tmp_path: Path, changes: dict[str, int], difference: str
) -> None:
    section = job.section.model_copy(
        update={"checkpoint_url": str(tmp_path / "checkpoints"), "zero_stage": 1}
    )
    first = replace(job, section=section, run_dir=tmp_path, total_steps=1)
    rank_groups[1].call(train_and_tell, first)
    other = replace(first, section=section.model_copy(update=changes), total_steps=2)
    for world_size in (1, 2):
        with pytest.raises(
            CheckpointError, match=f"belongs to another training:\n  - {difference}\nSet them back"
        ):
            rank_groups[world_size].call(train_and_tell, other)


def test_ranks_whose_command_was_replaced_commit_nothing_over_the_new_owner(
    job: TrainJob, rank_groups: Ranks, tmp_path: Path
) -> None:
    """Settings that may change on the way do not show in a commit's origin: it would stand for the
    new owner's own."""
    mine = replace(with_student(job, checkpoint_url=str(tmp_path)), total_steps=1, owner=1)
    blobs = Blobs(mine.checkpoints_root)
    blobs.create(owner_key(1), b"mine")
    blobs.create(owner_key(2), b"another's")
    with pytest.raises(CheckpointError, match="belong to another command now"):
        rank_groups[1].call(train_and_tell, mine)
    assert newest_step(mine.checkpoints) == 0
    rank_groups[1].call(train_and_tell, replace(mine, owner=2))
    assert newest_step(mine.checkpoints) == 1


def test_ranks_train_from_a_store_that_may_only_be_read(
    job: TrainJob, rank_groups: Ranks, tmp_path: Path
) -> None:
    """Of what they have committed it never hears."""
    with read_only(Path(job.store_url), at=tmp_path / "seen") as seen:
        mine = replace(
            with_student(job, checkpoint_every_steps=1),
            store_url=str(seen),
            run_dir=tmp_path / "run",
            total_steps=2,
        )
        assert len(rank_groups[1].call(train_and_tell, mine)[0]) == 2
        assert newest_step(mine.checkpoints) == 2


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_stops_every_rank_and_names_the_sequences(
    job: TrainJob, rank_groups: Ranks, stage: int, tmp_path: Path
) -> None:
    wild = with_student(
        job,
        zero_stage=stage,
        learning_rate=1e30,
        min_learning_rate=1e30,
        warmup_steps=0,
        gradient_clip=1e30,
    )
    with pytest.raises(
        StudentError, match=r"step \d+: the (loss|gradient) is (nan|inf); its sequences were \d+"
    ):
        rank_groups[2].call(train_and_tell, replace(wild, run_dir=tmp_path))


def test_draws_from_the_tail_teach_and_lose_the_same_on_two_ranks(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path: Path
) -> None:
    target, student = (
        {"k": 4, "tail_draws": 6},
        {"checkpoint_every_steps": 100, "init": "config", "max_steps": 20, "learning_rate": 2e-2},
    )
    plan = tiny_world.plan(tmp_path, target=target, student=student)
    tiny_world.fill_store(plan)
    job = plan.jobs[0]
    alone = rank_groups[1].call(
        train_and_tell, with_student(job, zero_stage=0, micro_batch_sequences=8)
    )[0]
    assert alone[-1].loss < alone[0].loss - 0.03
    assert (
        relative_gap(
            rank_groups[2].call(
                train_and_tell, with_student(job, zero_stage=3, micro_batch_sequences=3)
            )[0],
            alone,
        )
        <= 1e-6
    )


def test_weighted_draws_from_a_store_teach_jsd_and_lose_the_same_on_two_ranks(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path: Path
) -> None:
    """A record holds all that there is; the entries alone hold too little mass for JSD."""
    target = {
        "k": 4,
        "tail_draws": 6,
        "weighted_draws": True,
        "label_logprob": True,
        "tail_entropy": True,
    }
    student = {
        "checkpoint_every_steps": 100,
        "init": "config",
        "max_steps": 20,
        "learning_rate": 1e-2,
        "divergence": "jsd",
    }
    plan = tiny_world.plan(tmp_path, target=target, student=student)
    tiny_world.fill_store(plan)
    job = plan.jobs[0]
    alone, shared = (
        rank_groups[ranks].call(train_and_tell, with_student(job, micro_batch_sequences=size))[0]
        for ranks, size in ((1, 8), (2, 3))
    )
    assert alone[-1].loss < alone[0].loss - 0.01
    assert relative_gap(shared, alone) <= 1e-6
    for one, two in zip(alone, shared, strict=True):
        assert one.max_draw_mass is not None
        assert one.max_draw_mass > 0.0
        assert two.max_draw_mass == pytest.approx(one.max_draw_mass, rel=1e-4)
        assert two.max_log_ratio == pytest.approx(one.max_log_ratio, rel=1e-4)


def test_the_z_loss_is_part_of_the_loss_and_has_a_figure_of_its_own(
    job: TrainJob, reference: list[TrainEvent], rank_groups: Ranks, tmp_path: Path
) -> None:
    short = replace(
        with_student(job, z_loss_weight=0.01, ce_weight=0.25), run_dir=tmp_path, total_steps=3
    )
    rows = rank_groups[2].call(train_and_tell, short)[0]
    for row in rows:
        assert row.loss == pytest.approx(
            row.divergence + 0.25 * row.cross_entropy + 0.01 * row.z_loss, rel=1e-6
        )
    assert rows[0].z_loss > 1.0  # the square of about log V at first
    assert {row.z_loss for row in reference} == {None}


def test_bfloat16_trains_within_its_rounding(
    job: TrainJob, reference: list[TrainEvent], rank_groups: Ranks
) -> None:
    rows = rank_groups[2].call(train_and_tell, with_student(job, zero_stage=2, dtype="bfloat16"))[0]
    assert relative_gap(rows, reference) <= 0.02


EXPORTS = [
    *((stage, "float32", 1e-5) for stage in (0, 1, 2, 3)),
    *(
        (stage, "bfloat16", 1e-2) for stage in (1, 2, 3)
    ),  # at stage 1 bfloat16 has an optimiser and checkpoint form of its own
]


@pytest.mark.parametrize(("stage", "dtype", "tolerance"), EXPORTS)
def test_an_export_is_the_model_that_takes_the_next_step(
    job: TrainJob, rank_groups: Ranks, stage: int, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    steady = with_student(
        job,
        zero_stage=stage,
        dtype=dtype,
        min_learning_rate=job.section.learning_rate,
        warmup_steps=0,
    )
    steady = replace(steady, run_dir=tmp_path / "run", total_steps=3)
    rank_groups[2].call(train_and_tell, steady)
    out = tmp_path / "export"
    tokenizer = load_tokenizer(steady.section.model)
    assert (
        export(
            steady.checkpoints,
            out,
            section=steady.section,
            tokenizer=tokenizer,
            card=str,
            tell=refuse_outage,
        )
        == 3
    )
    following = rank_groups[2].call(train_and_tell, replace(steady, total_steps=4))[0]
    assert [row.step for row in following] == [4]
    assert loss_of_step(steady, 3, model=out) == pytest.approx(following[0].loss, rel=tolerance)
