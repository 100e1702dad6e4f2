"""The training loop of a student: read a batch, take an optimiser step, journal it, checkpoint, and
leave on a stop request.

`train` is a plain function of a job and of an existing process group. It resumes by itself from the
newest commit of the job that verifies, with any number of ranks.
"""

import logging
from contextlib import closing, suppress
from dataclasses import asdict, replace
from time import monotonic

import torch
import torch.distributed as dist

from stillhouse.checkpoint.fence import require_owner
from stillhouse.checkpoint.manifest import Commit
from stillhouse.checkpoint.restore import Restored, restore
from stillhouse.checkpoint.writer import CheckpointWriter, attempt_name
from stillhouse.cluster.collectives import gathered
from stillhouse.cluster.heartbeat import PreviousAttempt, StopRequest
from stillhouse.errors import StudentError
from stillhouse.logits import kept_mass
from stillhouse.retry import Tell
from stillhouse.store import ChunkStore, StoreForbidden, StoreUnavailable, consumers
from stillhouse.store.object_store import Blobs
from stillhouse.student.adapters import initial_student
from stillhouse.student.engine import StudentEngine
from stillhouse.student.heartbeat import DriverLink
from stillhouse.student.job import TrainJob
from stillhouse.student.loader import Batch, BatchReader
from stillhouse.student.optimiser import learning_rate_at
from stillhouse.student.pairing import depends_on_kept_mass, require_kept_mass
from stillhouse.student.scoring import HeldoutScorer
from stillhouse.student.universal import convert
from stillhouse.tracking import (
    CheckpointEvent,
    DamagedEvent,
    DelayEvent,
    EarlyStopEvent,
    OutageEvent,
    PhaseEvent,
    RecoveryEvent,
    Tracker,
    TrainEvent,
)

_log = logging.getLogger(__name__)


def train(job: TrainJob, *, device: torch.device, journal: Tracker, link: DriverLink) -> bool:
    """Train up to `job.total_steps` on every rank of the existing process group, or until held-out
    scores end it; return True once the last step is committed, False where the group left before,
    on a stop request.

    Rank 0 journals the steps. Raises on every rank: ConfigError before the first step, where the
    divergence cannot learn from such targets; StudentError where a loss is not finite.
    """
    # resume from the newest commit that verifies
    on_outage = _outage_teller(job, journal)
    link.at(0, "commit")  # reading a large checkpoint, or waiting for a store, may take long
    with restore(job.checkpoints, origin=job.origin, convert=convert, tell=on_outage) as found:
        link.at(0, "start")
        began_at, resumed = monotonic(), 0 if found is None else found.step
        previous = _begin(job, found, device=device, journal=journal, link=link)
        if resumed >= job.total_steps:
            return True
        scorer = HeldoutScorer.begin(
            job, resumed=resumed, device=device, journal=journal, link=link, on_outage=on_outage
        )
        if _stop_if_over(job, scorer, resumed, journal, link):
            return True
        engine = _engine(job, found, device=device)

    with (
        closing(engine),
        _reader(job, link, start=resumed, device=device, on_outage=on_outage) as reader,
        _writer(job, journal, scorer) as writer,
    ):
        last_checkpoint = resumed
        scorer.score_at_begin(engine)
        for step in range(resumed, job.total_steps):
            # the batch of this step, or a stop request that comes while it is waited for
            began = monotonic()
            link.at(step + 1, "data")
            batch = reader.next_unless(lambda: link.stop_request is not None)
            is_busy, stop_request = _agreed(writer.busy, link.stop_request, device)
            if stop_request is not None:
                _leave(stop_request, writer, engine, step, link, must_commit=last_checkpoint < step)
                return False
            assert batch is not None
            _require_learnable_targets(batch, job, device)

            # forward, backward and the optimiser step
            event = _train_step(engine, batch, job, link, began=began)
            _report(event, job, journal, link)
            if previous is not None and step == resumed:
                journal.record(_recovery(previous, event, since_begin_s=monotonic() - began_at))

            # score it; then begin a checkpoint, which is written while training goes on
            must_commit = scorer.score_if_due(engine, event.step)
            is_due = job.is_checkpoint_due(event.step, last=last_checkpoint, is_busy=is_busy)
            if is_due or must_commit:
                _begin_checkpoint(writer, engine, event.step, link)
                last_checkpoint = event.step
            if scorer.is_over:
                break
        writer.wait()
    _stop_if_over(job, scorer, last_checkpoint, journal, link)
    return True


def _leave(
    stop_request: StopRequest,
    writer: CheckpointWriter,
    engine: StudentEngine,
    step: int,
    link: DriverLink,
    *,
    must_commit: bool,
) -> None:
    """Commit the state after `step` steps, unless it is committed already, within the time that the
    request leaves."""
    _log.info("the group commits step %d and leaves: %s", step, stop_request)
    deadline = monotonic() + stop_request.seconds_left
    if must_commit:
        _begin_checkpoint(writer, engine, step, link)
    writer.wait(max(0.0, deadline - monotonic()))
    if dist.get_rank() == 0:
        link.explain(stop_request.cause, stop_request.detail)


def _begin(
    job: TrainJob,
    found: Restored | None,
    *,
    device: torch.device,
    journal: Tracker,
    link: DriverLink,
) -> PreviousAttempt | None:
    """Report where the group begins. On rank 0, how its life before this one ended, or None where
    there was none; None on the others.

    Raises StudentError where the ranks failed too often since the last commit.
    """
    # to the log, on every rank
    rank, world_size, resumed = dist.get_rank(), dist.get_world_size(), found.step if found else 0
    of_group = f"rank {rank} of {world_size}, on {device}"
    _log.info("the %s is at step %d of %d; %s", job.role, resumed, job.total_steps, of_group)
    if rank > 0:
        return None
    # to the driver and the store
    previous = link.begin(resumed)
    _commit_as_consumer(job, resumed)
    link.stepped(resumed, job.order.chunks_finished(resumed))
    if previous is not None and previous.num_failures > job.section.max_failures:
        raise StudentError(
            f"the {job.role}'s ranks failed {previous.num_failures} times in a row after step "
            f"{resumed}, last because: {previous.detail}. Everything up to that step is committed: "
            "mend the cause and run again to go on from there."
        )
    # to the journal
    for problem in found.passed_over if found is not None else ():
        journal.record(DamagedEvent(job.role, problem))
    if resumed < job.total_steps:
        journal.record(PhaseEvent(job.role, "loading"))
    return previous


def _commit_as_consumer(job: TrainJob, committed_step: int) -> None:
    """Record in the store which chunks this student will not read again.

    Best effort: a store that is unavailable keeps these chunks until the next commit, and a
    read-only one for good, of which the command has warned.
    """
    with suppress(StoreUnavailable, StoreForbidden):
        consumers.commit(ChunkStore(job.store_url, job.recipe), job.consumer(committed_step))


def _engine(job: TrainJob, found: Restored | None, *, device: torch.device) -> StudentEngine:
    """The engine with the state of a checkpoint, or at the beginning."""
    section = job.section
    sequences_at_once = dist.get_world_size() * section.micro_batch_sequences
    engine = StudentEngine(
        initial_student(section),
        section=section,
        vocab_size=job.recipe.vocab_size,
        num_micro_batches=-(-section.global_batch_sequences // sequences_at_once),
        device=device,
    )
    if found is not None:
        engine.load(found)
    return engine


def _report(event: TrainEvent, job: TrainJob, journal: Tracker, link: DriverLink) -> None:
    """Journal a step, and tell the driver of it. On rank 0 alone."""
    if dist.get_rank() == 0:
        link.at(event.step, "commit")  # the journal's disk may be full
        journal.record(event)
        link.stepped(event.step, job.order.chunks_finished(event.step))


def _stop_if_over(
    job: TrainJob, scorer: HeldoutScorer, step: int, journal: Tracker, link: DriverLink
) -> bool:
    """Whether training stops early after `step`, which is committed. Rank 0 then reports it, and
    that nothing is read any more."""
    best = scorer.history.best
    if not scorer.is_over or step >= job.total_steps or best is None:
        return False
    if dist.get_rank() == 0:
        journal.record(EarlyStopEvent(job.role, step, *best))
        link.stepped(step, job.order.chunks_finished(job.total_steps))
        with suppress(StoreUnavailable, StoreForbidden):
            done = replace(job.consumer(step), total_steps=step)
            consumers.commit(ChunkStore(job.store_url, job.recipe), done)
    return True


def _outage_teller(job: TrainJob, journal: Tracker) -> Tell:
    who = f"{job.role}, rank {dist.get_rank()}"
    return lambda seconds, why: journal.record(OutageEvent(who, seconds, why))


def _reader(
    job: TrainJob, link: DriverLink, *, start: int, device: torch.device, on_outage: Tell
) -> BatchReader:
    return BatchReader(
        ChunkStore(job.store_url, job.recipe),
        job.order,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        micro_batch=job.section.micro_batch_sequences,
        start=start,
        stop=job.total_steps,
        prefetch=job.section.prefetch_batches,
        on_bad_chunk=link.report_bad_chunk,
        on_outage=on_outage,
        on_read=link.reading,
        pin_memory=device.type == "cuda",
    )


def _writer(job: TrainJob, journal: Tracker, scorer: HeldoutScorer) -> CheckpointWriter:
    rank, root = dist.get_rank(), Blobs(job.checkpoints_root)

    def on_commit(commit: Commit, seconds: float, blocking_s: float) -> None:
        journal.record(
            CheckpointEvent(job.role, commit.step, seconds, commit.num_bytes, blocking_s)
        )
        _commit_as_consumer(job, commit.step)

    def on_delay(step: int, why: str) -> None:
        journal.record(DelayEvent(job.role, step, rank, why))

    def require_own_command() -> None:
        if job.owner is not None:
            require_owner(root, job.owner)

    return CheckpointWriter(
        job.checkpoints,
        origin=job.origin,
        attempt=attempt_name(),
        rank=rank,
        world_size=dist.get_world_size(),
        keep=job.section.keep_checkpoints,
        on_commit=on_commit,
        on_delay=on_delay,
        require_owner=require_own_command,
        best_until=scorer.best_until,
    )


def _agreed(
    is_busy: bool, stop_request: StopRequest | None, device: torch.device
) -> tuple[bool, StopRequest | None]:
    """Whether any rank is busy writing a checkpoint, and a stop request that any rank has received:
    the same on every rank. A collective."""
    flags = torch.tensor([is_busy, stop_request is not None], dtype=torch.float32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if flags[1] == 0.0:
        return bool(flags[0]), None
    known = gathered(None if stop_request is None else asdict(stop_request))
    return bool(flags[0]), StopRequest(**next(each for each in known if each is not None))


def _require_learnable_targets(batch: Batch, job: TrainJob, device: torch.device) -> None:
    """Of the first batch of a training. Raises ConfigError on every rank where the divergence sees
    the tail as one bucket, and the kept entries of all ranks hold too little mass. A collective."""
    if batch.step > 0 or not depends_on_kept_mass(job.section, job.recipe.spec):
        return
    mass_T = torch.cat([kept_mass(micro_batch.target) for micro_batch in batch.micro_batches])
    sums = torch.tensor([mass_T.sum().item(), len(mass_T)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    mass, num_tokens = sums.tolist()
    require_kept_mass(job.section, job.recipe.spec, kept_mass=mass / max(num_tokens, 1.0))


def _train_step(
    engine: StudentEngine, batch: Batch, job: TrainJob, link: DriverLink, *, began: float
) -> TrainEvent:
    """Train on a batch; `began`: when the step began, which includes waiting for the batch."""
    # a seed for dropout and the like, which a resumed training repeats
    step, data_wait_s = batch.step, monotonic() - began
    link.at(step + 1, "step")
    torch.manual_seed(hash((job.section.seed, step, dist.get_rank())))

    # the step
    learning_rate = learning_rate_at(step, section=job.section, total_steps=job.total_steps)
    try:
        terms = engine.train_step(batch.micro_batches, step=step, learning_rate=learning_rate)
    except StudentError as error:
        shown = ", ".join(map(str, batch.sequences[:8]))
        raise StudentError(
            f"{job.role}, step {step}: {error}; its sequences were "
            f"{shown}{', ...' if len(batch.sequences) > 8 else ''}. The last commit is untouched; "
            "lower student.learning_rate or look at those sequences, then run again"
        ) from None

    # its event for the journal
    seconds = monotonic() - began
    return TrainEvent(
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
        clipped=terms.grad_norm > job.section.gradient_clip,
        max_log_ratio=terms.max_log_ratio,
        max_draw_mass=terms.max_draw_mass,
    )


def _begin_checkpoint(
    writer: CheckpointWriter, engine: StudentEngine, step: int, link: DriverLink
) -> None:
    """Copy the state after `step` steps to host memory, and hand it to the writer's thread. Waits
    first while an earlier checkpoint is being written."""
    link.at(step, "snapshot")
    snapshot = engine.snapshot(step)
    link.at(step, "commit")
    writer.submit(snapshot)


def _recovery(
    previous: PreviousAttempt, first: TrainEvent, *, since_begin_s: float
) -> RecoveryEvent:
    """What was lost since the life before this one, up to the `first` step of this one."""
    resumed = first.step - 1
    return RecoveryEvent(
        first.role,
        cause="died" if previous.cause == "stop" else previous.cause,
        detail=previous.detail,
        seconds=previous.seconds_ago + since_begin_s,
        world_size=first.world_size,
        resumed_step=resumed,
        lost_steps=max(0, previous.last_step - resumed),
    )
