"""What runs on the ranks of the training tests: the real training loop and the real engine, with
the journal kept in memory."""

import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from helpers.batches import next_batch
from helpers.checkpoints import ORIGIN
from stillhouse.checkpoint.restore import Restored, restore
from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.heartbeat import Cause, Phase, PreviousAttempt, StopRequest
from stillhouse.errors import UserError
from stillhouse.losses.distillation import distillation_loss
from stillhouse.losses.divergences import divergence_named
from stillhouse.models.batch import hidden_at
from stillhouse.models.heads import head_of
from stillhouse.models.load import load_model
from stillhouse.retry import Patience
from stillhouse.store import ChunkStore, StoreUnavailable
from stillhouse.student.engine import StudentEngine
from stillhouse.student.fetching import refuse_bad_chunk
from stillhouse.student.heartbeat import CoordinatorLink
from stillhouse.student.job import TrainJob
from stillhouse.student.loader import BatchReader
from stillhouse.student.train import train
from stillhouse.student.universal import convert
from stillhouse.tracking import HeldoutEvent, RunEvent, TrainEvent

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ListTracker:
    """A tracker that keeps its rows."""

    rows: list[RunEvent] = field(default_factory=list)

    def record(self, row: RunEvent) -> None:
        self.rows.append(row)


@dataclass(slots=True)
class Alone:
    """A link to nobody, which keeps what it is told: no stop request comes but what the test sets,
    and no damaged chunk is replaced."""

    stop_request: StopRequest | None = None
    told: list[tuple[str, object, object]] = field(default_factory=list)

    def begin(self, committed_step: int) -> PreviousAttempt | None:
        self.told.append(("begin", committed_step, None))
        return None

    def at(self, step: int, phase: Phase) -> None:
        self.told.append(("at", step, phase))

    def reading(self, chunk: int | None) -> None:
        self.told.append(("reading", chunk, None))

    def stepped(self, step: int, chunks_finished: int) -> None:
        self.told.append(("stepped", step, chunks_finished))

    def explain(self, cause: Cause, detail: str) -> None:
        self.told.append(("explain", cause, detail))

    def report_bad_chunk(self, number: int) -> None:
        refuse_bad_chunk(number)


def refuse_outage(seconds: float, why: str) -> None:
    """For stores that are never away."""
    raise AssertionError(f"the store was away for {seconds:.0f} s: {why}")


@dataclass(slots=True)
class ToldToLeave(Alone):
    """The same, but a stop request comes once some steps are taken."""

    to_come: StopRequest | None = None
    after_steps: int = 1

    def stepped(self, step: int, chunks_finished: int) -> None:
        self.told.append(("stepped", step, chunks_finished))
        if step >= self.after_steps:
            self.stop_request = self.to_come


def train_until_told(
    job: TrainJob, stop_request: StopRequest, after_steps: int
) -> tuple[bool, list[RunEvent]]:
    """Train until the stop request: whether the job is done, and what was journalled when the loop
    returned."""
    tracker = ListTracker()
    done = train(
        job,
        device=CPU,
        journal=tracker,
        link=ToldToLeave(to_come=stop_request, after_steps=after_steps),
    )
    return done, list(tracker.rows)


def train_and_tell(job: TrainJob) -> list[TrainEvent]:
    """Train the job; rank 0's training rows, in order."""
    return [row for row in train_and_keep_rows(job) if isinstance(row, TrainEvent)]


def train_and_keep_rows(job: TrainJob) -> list[RunEvent]:
    """Train the job; all that this rank journals, in order."""
    tracker = ListTracker()
    train(job, device=CPU, journal=tracker, link=Alone())
    return list(tracker.rows)


def heldout_of(rows: Sequence[RunEvent]) -> list[tuple[int, tuple[float, ...]]]:
    """The held-out scores in a journal: each step, and all that was measured but its seconds."""
    return [
        (row.step, astuple(replace(row, seconds=0.0, time=0.0)))
        for row in rows
        if isinstance(row, HeldoutEvent)
    ]


@dataclass(frozen=True, slots=True)
class PhaseTracker:
    """A tracker that keeps in which phase its rank is whenever a step's row is recorded."""

    link: Alone
    phases: list[object] = field(default_factory=list)

    def record(self, row: RunEvent) -> None:
        if isinstance(row, TrainEvent):
            *_, (_, _, phase) = (each for each in self.link.told if each[0] == "at")
            self.phases.append(phase)


def phases_at_rows(job: TrainJob) -> list[object]:
    """Train the job; the phase that this rank is in as it records each step."""
    link = Alone()
    tracker = PhaseTracker(link)
    train(job, device=CPU, journal=tracker, link=link)
    return tracker.phases


def train_on_a_line(job: TrainJob, coordinator: Coordinator) -> None:
    """Train the job alone, with heartbeats to the coordinator, which journals."""
    with CoordinatorLink(
        coordinator, job, "off", rank=0, world_size=1, teachers_at_work=False
    ) as link:
        train(job, device=CPU, journal=coordinator, link=link)


def refusal_of(job: TrainJob) -> str:
    """The mistake of the user's that this rank names instead of training; '' where it trains."""
    try:
        train_and_tell(job)
    except UserError as error:
        return str(error)
    return ""


def train_through(job: TrainJob, endpoint: str) -> list[TrainEvent]:
    """The same, with the object store at another endpoint than the session's."""
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    try:
        return train_and_tell(job)
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before


def restored_through(
    url: str, endpoint: str, patience: Patience, timeout_s: float
) -> tuple[str, list[str]]:
    """What restoring the checkpoints of ORIGIN comes to, and what was told of the wait; a
    collective may take `timeout_s` meanwhile."""
    told: list[str] = []
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
    try:
        with restore(
            url,
            origin=ORIGIN,
            convert=convert,
            tell=lambda _, why: told.append(why),
            patience=patience,
        ) as found:
            return f"step {found.step if found else 0}", told
    except StoreUnavailable as error:
        return str(error), told
    finally:
        distributed_c10d._set_pg_timeout(timedelta(seconds=60))
        os.environ["AWS_ENDPOINT_URL"] = before


def first_gradients(job: TrainJob) -> dict[str, Tensor]:
    """The full gradient of every parameter at the first step."""
    section = job.section
    world_size = dist.get_world_size()
    engine = StudentEngine(
        load_model(section, random_init_seed=section.seed),
        section=section,
        vocab_size=job.recipe.vocab_size,
        num_micro_batches=-(
            -section.global_batch_sequences // (world_size * section.micro_batch_sequences)
        ),
        device=CPU,
    )
    reader = BatchReader(
        ChunkStore(job.store_url, job.recipe),
        job.order,
        rank=dist.get_rank(),
        world_size=world_size,
        micro_batch=section.micro_batch_sequences,
        start=0,
        stop=1,
        prefetch=1,
        on_bad_chunk=refuse_bad_chunk,
        on_outage=refuse_outage,
    )
    with reader:
        batch = next_batch(reader)
        engine.accumulate(batch.micro_batches, step=batch.step)
    gradients = engine.full_gradients()
    engine.close()
    return gradients


def refusals_of(job: TrainJob, folders: Sequence[Path], universal: bool = False) -> list[str]:
    """Load each of these folders of a checkpoint into one engine, where the environment allows
    code; the error of each, '' for none."""
    section, before, refusals = job.section, os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"], []
    engine = StudentEngine(
        load_model(section, random_init_seed=section.seed),
        section=section,
        vocab_size=job.recipe.vocab_size,
        num_micro_batches=2,
        device=CPU,
    )
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "0"
    try:
        for folder in folders:
            try:
                engine.load(Restored(1, folder, universal, ()))
                refusals.append("")
            except Exception as error:
                refusals.append(f"{type(error).__name__}: {error}")
    finally:
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
    engine.close()
    return refusals


def loss_of_step(job: TrainJob, step: int, *, model: Path) -> float:
    """The mean loss that a plain Hugging Face model has on the batch of one step, in this process,
    without an engine."""
    section = job.section.model_copy(update={"model": str(model), "init": "weights"})
    store = ChunkStore(job.store_url, job.recipe)
    where: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "micro_batch": 64,
        "start": step,
        "stop": step + 1,
        "prefetch": 1,
    }
    reader = BatchReader(
        store, job.order, **where, on_bad_chunk=refuse_bad_chunk, on_outage=refuse_outage
    )
    with reader:
        batch = next_batch(reader)
    (whole,) = batch.micro_batches
    lm = load_model(section)
    with torch.no_grad():
        hidden_TH = hidden_at(lm, whole.tokens)
        terms = distillation_loss(
            hidden_TH,
            head_of(lm, vocab_size=job.recipe.vocab_size),
            whole.target,
            divergence=divergence_named(section.divergence, section.mix),
            labels_T=whole.tokens.labels_T,
            ce_weight=section.ce_weight,
        )
    return terms.total.item() / whole.tokens.num_targets


def with_student(job: TrainJob, **changes: Any) -> TrainJob:
    """The job with other settings of its student, and a directory of its own."""
    section = job.section.model_copy(update=changes)
    name = "-".join(f"{key}-{value}" for key, value in changes.items())
    return replace(job, section=section, run_dir=job.run_dir / name)
