"""A student is scored on held-out text while it learns, on real DeepSpeed engines: the scores are
those of the evaluation, on any number of ranks, and training does not notice."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pytest

from helpers.models import make_model
from helpers.ranks import RankGroup
from helpers.training import (
    heldout_of,
    refuse_outage,
    train_and_keep_rows,
    train_and_tell,
    train_until_told,
    with_student,
)
from helpers.world import TinyWorld
from stillhouse.cluster.heartbeat import StopRequest
from stillhouse.cluster.processes import Secrets
from stillhouse.config import ModelSection
from stillhouse.evaluation.heldout import heldout_teacher
from stillhouse.evaluation.scores import EvaluationJob, evaluate
from stillhouse.losses.score import Scores
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.pipeline import Plan
from stillhouse.pipeline.heldout import first_sequences
from stillhouse.sequence import Sequences
from stillhouse.store.object_store import Blobs
from stillhouse.student.export import export
from stillhouse.student.heldout import HeldoutTeacher, write_heldout
from stillhouse.student.job import HeldoutPlan, TrainJob
from stillhouse.tracking import EarlyStopEvent, HeldoutEvent, RunEvent, TrainEvent

Ranks = dict[int, RankGroup]
KEY = "heldout/of-this-test.safetensors"
STEPS = 7


@pytest.fixture(scope="module")
def plan(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A student with dropout, which an evaluation has to switch off, and on again."""
    folder = tmp_path_factory.mktemp("heldout")
    make_model(
        folder / "student",
        vocab_size=300,
        hidden_size=16,
        seed=2,
        config={"attention_dropout": 0.2},
    )
    plan = tiny_world.plan(
        folder / "run",
        student={
            "model": str(folder / "student"),
            "checkpoint_every_steps": 3,
            "max_steps": STEPS,
            "min_learning_rate": tiny_world.values["student"]["learning_rate"],
        },
        evaluate={"every_steps": 3, "tokens_while_learning": 100},
    )
    tiny_world.fill_store(plan)
    return plan


@dataclass(frozen=True)
class Scored:
    """Jobs that are scored while they learn, and what was journalled of whole ones. Both the
    teacher's part and a whole training are made once."""

    plan: Plan
    groups: Ranks
    folder: Path
    whole: dict[tuple[int, int], list[RunEvent]] = field(default_factory=dict)

    @cached_property
    def teacher(self) -> HeldoutTeacher:
        return heldout_teacher(evaluation_of(self.plan), text_of(self.plan))

    def job(self, run_dir: Path, **student: object) -> TrainJob:
        """The student's job in a directory of its own, where its teacher's part is published."""
        job = replace(with_student(self.plan.jobs[0], **student), run_dir=run_dir)
        write_heldout(Blobs(job.checkpoints_root), KEY, self.teacher)
        return replace(job, heldout=HeldoutPlan(every_steps=3, key=KEY, block_tokens=13))

    def rows(self, *, stage: int, ranks: int) -> list[RunEvent]:
        """The journal of a training that nothing stopped."""
        if (stage, ranks) not in self.whole:
            job = self.job(self.folder / f"{stage}-{ranks}", zero_stage=stage)
            self.whole[stage, ranks] = self.groups[ranks].call(train_and_keep_rows, job)[0]
        return self.whole[stage, ranks]


@pytest.fixture(scope="module")
def scored(plan: Plan, rank_groups: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return Scored(plan, rank_groups, tmp_path_factory.mktemp("scored"))


def text_of(plan: Plan) -> Sequences:
    return first_sequences(plan.sources.heldout, num_targets=100)


def evaluation_of(plan: Plan) -> EvaluationJob:
    return EvaluationJob(
        teacher=plan.config.teacher,
        models={"student": plan.config.student},
        vocab_size=plan.recipe.vocab_size,
        section=plan.config.evaluate,
        device="cpu",
        threads=1,
        secrets=Secrets(None),
    )


def scores_in(event: HeldoutEvent) -> list[float]:
    return [getattr(event, name) for name in Scores.__dataclass_fields__]


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_training_is_bit_identical_with_and_without_scores(
    scored: Scored, rank_groups: Ranks, tmp_path: Path, stage: int, ranks: int
) -> None:
    silent = replace(with_student(scored.plan.jobs[0], zero_stage=stage), run_dir=tmp_path)
    ours = scored.rows(stage=stage, ranks=ranks)
    theirs = rank_groups[ranks].call(train_and_tell, silent)[0]
    assert len(heldout_of(ours)) == 4
    steps = [row for row in ours if isinstance(row, TrainEvent)]
    assert [(row.step, row.loss, row.grad_norm) for row in steps] == [
        (row.step, row.loss, row.grad_norm) for row in theirs
    ]


def test_scores_are_those_of_the_evaluation_whatever_the_ranks(
    tiny_world: TinyWorld, plan: Plan, scored: Scored, rank_groups: Ranks, tmp_path: Path
) -> None:
    """Without dropout, which differs between ranks."""
    plain = {"model": tiny_world.values["student"]["model"]}
    student = plan.config.student.model_copy(update=plain)
    found = evaluate(replace(evaluation_of(plan), models={"student": student}), text_of(plan))
    wanted = found["student"]
    assert 100 <= wanted.num_tokens < 100 + plan.recipe.sequence_length
    events = {}
    for ranks, stage in ((1, 0), (2, 3)):
        job = scored.job(tmp_path / str(ranks), zero_stage=stage, **plain)
        rows = rank_groups[ranks].call(train_and_keep_rows, job)[0]
        events[ranks] = [row for row in rows if isinstance(row, HeldoutEvent)]
        assert [event.step for event in events[ranks]] == [0, 3, 6, STEPS]
        untrained = events[ranks][0]
        assert scores_in(untrained) == pytest.approx(
            [getattr(wanted, name) for name in Scores.__dataclass_fields__], abs=1e-6
        )
    for one, two in zip(events[1], events[2], strict=True):
        assert scores_in(one) == pytest.approx(scores_in(two), abs=1e-5)
    assert events[1][-1].kl < events[1][0].kl


def test_a_resumed_training_has_the_same_scores(
    scored: Scored, rank_groups: Ranks, tmp_path: Path
) -> None:
    job = scored.job(tmp_path, zero_stage=1)
    first = rank_groups[2].call(
        train_until_told, job, StopRequest("notice", 60.0, "aws: terminate"), 4
    )[0][1]
    second = rank_groups[2].call(train_and_keep_rows, job)[0]
    assert heldout_of(first + second) == heldout_of(scored.rows(stage=1, ranks=2))
    assert [step for step, _ in heldout_of(second)] == [6, STEPS]


def test_a_student_that_gets_worse_stops_early_and_its_best_is_kept_and_exported(
    plan: Plan, scored: Scored, rank_groups: Ranks, tmp_path: Path
) -> None:
    """A training that was stopped on the way decides the same, and one that is over takes no
    step."""

    def wild(run_dir: Path) -> TrainJob:
        job = scored.job(run_dir, learning_rate=0.3, warmup_steps=0, keep_checkpoints=1)
        plan_of_scores = HeldoutPlan(1, KEY, block_tokens=13, patience=2, keep_best=True)
        return replace(job, heldout=plan_of_scores, total_steps=40)

    def steps(rows: list[RunEvent]) -> list[int]:
        return [row.step for row in rows if isinstance(row, TrainEvent)]

    # it stops, two scores after the best
    job = wild(tmp_path / "whole")
    whole = rank_groups[2].call(train_and_keep_rows, job)[0]
    (end,) = [row for row in whole if isinstance(row, EarlyStopEvent)]
    assert steps(whole)[-1] == end.step == end.best_step + 2 < 40
    kls = {row.step: row.kl for row in whole if isinstance(row, HeldoutEvent) and row.step > 0}
    assert end.best_kl == min(kls.values()) == kls[end.best_step]
    assert steps(rank_groups[2].call(train_and_keep_rows, job)[0]) == []

    # stopped by a notice on the way
    stopped = wild(tmp_path / "stopped")
    notice = StopRequest("notice", 60.0, "aws: terminate")
    first = rank_groups[2].call(train_until_told, stopped, notice, end.step - 1)[0][1]
    second = rank_groups[2].call(train_and_keep_rows, stopped)[0]
    assert heldout_of(first + second) == heldout_of(whole)
    assert [replace(row, time=0.0) for row in second if isinstance(row, EarlyStopEvent)] == [end]

    # the best is exported
    out = tmp_path / "best"
    found = export(
        job.checkpoints,
        out,
        section=job.section,
        tokenizer=load_tokenizer(plan.config.teacher.model),
        card=str,
        step=end.best_step,
        tell=refuse_outage,
    )
    assert found == end.best_step
    student = ModelSection(model=str(out), dtype="float32")
    job_of_scores = replace(evaluation_of(plan), models={"student": student})
    scores = evaluate(job_of_scores, text_of(plan))["student"]
    assert scores.kl == pytest.approx(end.best_kl, abs=1e-6)
