"""The training loop of a student: read, step, journal, commit, and leave when asked to.

A plain function of a job and an existing process group. It resumes by itself: where the job has a
commit that verifies, it goes on from there, with however many ranks there are now.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from time import monotonic

import torch
import torch.distributed as dist

from stillhouse.checkpoint.fence import require_owner
from stillhouse.checkpoint.manifest import Commit
from stillhouse.checkpoint.restore import restore
from stillhouse.checkpoint.writer import CheckpointWriter, attempt_name
from stillhouse.cluster.collectives import gathered
from stillhouse.cluster.coordinator import PreviousAttempt, StopRequest
from stillhouse.errors import StudentError
from stillhouse.logits import kept_mass
from stillhouse.models import load_model
from stillhouse.retry import Tell
from stillhouse.store import ChunkStore, StoreForbidden, StoreUnavailable, consumers
from stillhouse.store.object_store import Blobs
from stillhouse.student.engine import StudentEngine, learning_rate_at
from stillhouse.student.heartbeat import DriverLink
from stillhouse.student.job import TrainJob
from stillhouse.student.loader import Batch, BatchReader
from stillhouse.student.pairing import depends_on_kept_mass, require_kept_mass
from stillhouse.student.universal import convert
from stillhouse.tracking import (
    CheckpointRow,
    DamagedRow,
    DelayRow,
    OutageRow,
    RecoveryRow,
    Tracker,
    TrainRow,
)

_log = logging.getLogger(__name__)


def train(job: TrainJob, *, device: torch.device, journal: Tracker, link: DriverLink) -> bool:
    """Train until `job.total_steps`, on every rank of the existing process group; False where the
    group left before, on a stop request.

    It leaves once its last step is committed, or the time to stop is over. Rank 0 journals. Raises
    ConfigError on every rank before the first step where the divergence cannot learn from such
    targets, and StudentError on a loss that is not finite.
    """
    rank, world_size, section = dist.get_rank(), dist.get_world_size(), job.section
    on_outage = _teller(job, journal, rank=rank)
    link.at(0, "commit")  # a large checkpoint takes long to read, and a bucket may be away
    with restore(job.checkpoints, origin=job.origin, convert=convert, tell=on_outage) as found:
        link.at(0, "start")
        began_at = monotonic()
        done = 0 if found is None else found.step
        began_from = "the beginning" if found is None else f"the commit of step {done}"
        _log.info(
            "the %s goes on from %s to step %d; rank %d of %d, on %s",
            job.role,
            began_from,
            job.total_steps,
            rank,
            world_size,
            device,
        )
        past = _begin(link, job, done) if rank == 0 else None
        for problem in found.passed_over if found is not None and rank == 0 else ():
            journal.record(DamagedRow(job.role, problem))
        if done >= job.total_steps:
            return True
        engine = _engine(job, device=device, world_size=world_size)
        if found is not None:
            engine.load(found)
    try:
        with (
            _reader(
                job,
                link,
                start=done,
                rank=rank,
                world_size=world_size,
                device=device,
                on_outage=on_outage,
            ) as reader,
            _writer(job, journal) as writer,
        ):
            submitted, due = done, False
            for step in range(done, job.total_steps):
                began = monotonic()
                link.at(step + 1, "data")
                batch = reader.next_unless(lambda: link.stop_request is not None)
                busy, stop_request = _agreed(writer.busy, link.stop_request, device)
                if stop_request is not None:
                    leave_at = monotonic() + stop_request.seconds_left
                    _log.info("the group commits step %d and leaves: %s", step, stop_request)
                    if submitted < step:
                        _submit(writer, engine, step, link)
                    writer.wait(max(0.0, leave_at - monotonic()))
                    if rank == 0:
                        link.explain(stop_request.cause, stop_request.detail)
                    return False
                assert batch is not None
                if step == 0 and depends_on_kept_mass(section):
                    require_kept_mass(
                        section, job.recipe.spec, kept_mass=_kept_mass_over_ranks(batch, device)
                    )
                row = _train_one(engine, batch, job, link, began=began)
                if rank == 0:
                    link.at(step + 1, "commit")  # the journal's disk may be full
                    journal.record(row)
                    link.stepped(step + 1, job.order.chunks_finished(step + 1))
                if past is not None:
                    journal.record(
                        _recovery(
                            past,
                            job,
                            resumed=done,
                            world_size=world_size,
                            since_begin_s=monotonic() - began_at,
                        )
                    )
                    past = None
                due = due or (step + 1) % section.checkpoint_every_steps == 0
                if step + 1 == job.total_steps or (due and not busy):
                    _submit(writer, engine, step + 1, link)
                    submitted, due = step + 1, False
            writer.wait()
            _log.info(
                "the %s has taken all its %d steps, and they are committed",
                job.role,
                job.total_steps,
            )
    finally:
        engine.close()
    return True


def _begin(link: DriverLink, job: TrainJob, done: int) -> PreviousAttempt | None:
    """Tell the driver where the group begins. Raises StudentError where it was lost too often since
    the last commit."""
    past = link.begin(done)
    _tell_the_store(job, done)
    link.stepped(done, job.order.chunks_finished(done))
    if past is not None and past.num_failures > job.section.max_failures:
        raise StudentError(
            f"the {job.role}'s ranks failed {past.num_failures} times in a row after step {done}, "
            f"last because: {past.detail}. "
            "Everything up to that step is committed: mend the cause and run again to go on from "
            "there."
        )
    return past


def _tell_the_store(job: TrainJob, committed_step: int) -> None:
    """Which chunks this student will read again. A store that does not answer hears it after the
    next commit, and keeps them until then.

    One that may only be read never hears it, which its command has told.
    """
    with suppress(StoreUnavailable, StoreForbidden):
        consumers.commit(ChunkStore(job.store_url, job.recipe), job.reader(committed_step))


def _engine(job: TrainJob, *, device: torch.device, world_size: int) -> StudentEngine:
    section = job.section
    return StudentEngine(
        load_model(section, random_init_seed=section.seed if section.init == "config" else None),
        section=section,
        vocab_size=job.recipe.vocab_size,
        num_micro_batches=-(
            -section.global_batch_sequences // (world_size * section.micro_batch_sequences)
        ),
        device=device,
    )


def _teller(job: TrainJob, journal: Tracker, *, rank: int) -> Tell:
    def tell(seconds: float, why: str) -> None:
        journal.record(OutageRow(f"{job.role}, rank {rank}", seconds, why))

    return tell


def _reader(
    job: TrainJob,
    link: DriverLink,
    *,
    start: int,
    rank: int,
    world_size: int,
    device: torch.device,
    on_outage: Tell,
) -> BatchReader:
    return BatchReader(
        ChunkStore(job.store_url, job.recipe),
        job.order,
        rank=rank,
        world_size=world_size,
        micro_batch=job.section.micro_batch_sequences,
        start=start,
        stop=job.total_steps,
        prefetch=job.section.prefetch_batches,
        on_bad_chunk=link.report_bad_chunk,
        on_outage=on_outage,
        on_read=link.reading,
        pin_memory=device.type == "cuda",
    )


def _writer(job: TrainJob, journal: Tracker) -> CheckpointWriter:
    rank = dist.get_rank()

    def on_commit(made: Commit, seconds: float, blocking_s: float) -> None:
        journal.record(CheckpointRow(job.role, made.step, seconds, made.num_bytes, blocking_s))
        _tell_the_store(job, made.step)

    def on_delay(step: int, why: str) -> None:
        journal.record(DelayRow(job.role, step, rank, why))

    return CheckpointWriter(
        job.checkpoints,
        origin=job.origin,
        attempt=attempt_name(),
        rank=rank,
        world_size=dist.get_world_size(),
        keep=job.section.keep_checkpoints,
        on_commit=on_commit,
        on_delay=on_delay,
        require_owner=_fence(job),
    )


def _kept_mass_over_ranks(batch: Batch, device: torch.device) -> float:
    """The mean over the tokens of a batch of all ranks, the same on every rank."""
    mass_T = torch.cat([kept_mass(micro_batch.target) for micro_batch in batch.micro_batches])
    sums = torch.tensor([mass_T.sum().item(), len(mass_T)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    mass, num_tokens = map(float, sums)
    return mass / max(num_tokens, 1.0)


def _fence(job: TrainJob) -> Callable[[], None]:
    """What raises once another command owns the place of the checkpoints."""
    blobs = Blobs(job.place)

    def require() -> None:
        if job.owner is not None:
            require_owner(blobs, job.owner)

    return require


def _train_one(
    engine: StudentEngine, batch: Batch, job: TrainJob, link: DriverLink, *, began: float
) -> TrainRow:
    step, data_wait_s = batch.state.step, monotonic() - began
    link.at(step + 1, "step")
    torch.manual_seed(hash((job.section.seed, step, dist.get_rank())))
    learning_rate = learning_rate_at(step, section=job.section, total_steps=job.total_steps)
    try:
        terms = engine.train_step(batch.micro_batches, learning_rate=learning_rate)
    except StudentError as error:
        raise StudentError(
            f"{job.role}, step {step}: {error}; {_named(batch)}. The last commit is untouched; "
            f"{_ADVICE}"
        ) from None
    seconds = monotonic() - began
    return TrainRow(
        role=job.role,
        step=step + 1,
        loss=terms.loss,
        divergence=terms.divergence,
        cross_entropy=terms.cross_entropy,
        z_loss=terms.z_loss,
        grad_norm=terms.grad_norm,
        learning_rate=learning_rate,
        num_tokens=terms.num_tokens,
        seconds=seconds,
        data_wait_s=data_wait_s,
        tokens_per_s=terms.num_tokens / seconds,
        world_size=dist.get_world_size(),
    )


_ADVICE = "lower student.learning_rate or look at those sequences, then run again"


def _named(batch: Batch) -> str:
    shown = ", ".join(map(str, batch.sequences[:8]))
    return f"its sequences were {shown}{', ...' if len(batch.sequences) > 8 else ''}"


def _submit(writer: CheckpointWriter, engine: StudentEngine, step: int, link: DriverLink) -> None:
    """Copy the state after `step` steps; what follows goes on beside the training, unless an
    earlier checkpoint is still on its way."""
    link.at(step, "snapshot")
    snapshot = engine.snapshot(step)
    link.at(step, "commit")
    writer.submit(snapshot)


def _agreed(
    busy: bool, stop_request: StopRequest | None, device: torch.device
) -> tuple[bool, StopRequest | None]:
    """Whether any rank still writes a checkpoint, and the stop request that any of them knows of:
    the same on every rank."""
    flags = torch.tensor([busy, stop_request is not None], dtype=torch.float32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if flags[1] == 0.0:
        return bool(flags[0]), None
    known = gathered(None if stop_request is None else asdict(stop_request))
    return bool(flags[0]), StopRequest(**next(each for each in known if each is not None))


def _recovery(
    past: PreviousAttempt, job: TrainJob, *, resumed: int, world_size: int, since_begin_s: float
) -> RecoveryRow:
    cause = "died" if past.cause == "stop" else past.cause
    seconds = past.seconds_ago + since_begin_s
    return RecoveryRow(
        job.role, cause, past.detail, seconds, world_size, resumed, max(0, past.last_step - resumed)
    )
