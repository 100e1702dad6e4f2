"""The training loop of a student: read, step, journal, commit.

A plain function of a job and an existing process group. It resumes by itself: where the job's directory holds a commit that verifies,
it goes on from there.
"""

from time import monotonic

import torch
import torch.distributed as dist

from stillhouse.cluster import Board
from stillhouse.errors import CheckpointError, StudentError
from stillhouse.models import load_model
from stillhouse.store import ChunkStore
from stillhouse.student import checkpoint
from stillhouse.student.engine import StudentEngine, learning_rate_at
from stillhouse.student.job import TrainJob
from stillhouse.student.loader import Batch, BatchReader, refuse_bad_chunk
from stillhouse.tracking import CheckpointRow, Tracker, TrainRow


def train(job: TrainJob, *, device: torch.device, journal: Tracker, board: Board | None) -> None:
    """Train until `job.total_steps`, on every rank of the existing process group; commits checkpoints and journals from rank 0.

    With a `board`, cursors and damaged chunks are told to the teacher pool; without one a damaged chunk raises StudentError.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    section, order = job.section, job.order
    done = _restorable_step(job, world_size=world_size)
    if rank == 0 and board is not None:
        board.move_cursor(job.role, order.chunks_finished(done))
    if done >= job.total_steps:
        return
    seed = section.seed if section.init == "config" else None
    num_micro_batches = -(-section.global_batch_sequences // (world_size * section.micro_batch_sequences))
    engine = StudentEngine(
        load_model(section, random_init_seed=seed),
        section=section,
        vocab_size=job.recipe.vocab_size,
        num_micro_batches=num_micro_batches,
        device=device,
    )
    if done:
        engine.load(job.checkpoints, step=done)
    reader = BatchReader(
        ChunkStore(job.store_url, job.recipe),
        order,
        rank=rank,
        world_size=world_size,
        micro_batch=section.micro_batch_sequences,
        start=done,
        stop=job.total_steps,
        prefetch=section.prefetch_batches,
        on_bad_chunk=refuse_bad_chunk if board is None else board.report_bad_chunk,
        pin_memory=device.type == "cuda",
    )
    try:
        with reader:
            for step in range(done, job.total_steps):
                row = _train_one(engine, reader, job, step)
                if rank == 0:
                    journal.record(row)
                    if board is not None:
                        board.move_cursor(job.role, order.chunks_finished(step + 1))
                if (step + 1) % section.checkpoint_every_steps == 0 or step + 1 == job.total_steps:
                    _commit(engine, job, step + 1, journal if rank == 0 else None)
    finally:
        engine.close()


def _train_one(engine: StudentEngine, reader: BatchReader, job: TrainJob, step: int) -> TrainRow:
    began = monotonic()
    batch, data_wait_s = reader.next()
    torch.manual_seed(hash((job.section.seed, step, dist.get_rank())))
    learning_rate = learning_rate_at(step, section=job.section, total_steps=job.total_steps)
    try:
        terms = engine.train_step(batch.micro_batches, learning_rate=learning_rate)
    except StudentError as error:
        raise StudentError(f"{job.role}, step {step}: {error}; {_named(batch)}. The last commit is untouched; {_ADVICE}") from None
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
    )


_ADVICE = "lower student.learning_rate or look at those sequences, then run again"


def _named(batch: Batch) -> str:
    shown = ", ".join(map(str, batch.sequences[:8]))
    return f"its sequences were {shown}{', ...' if len(batch.sequences) > 8 else ''}"


def _restorable_step(job: TrainJob, *, world_size: int) -> int:
    """The step of the newest commit that verifies, agreed on by all ranks; 0 where there is none."""
    answer: list[tuple[checkpoint.Commit | None, str]] = [(None, "")]
    if dist.get_rank() == 0:
        try:
            chosen = checkpoint.newest(job.checkpoints)
            checkpoint.set_aside_after(job.checkpoints, chosen.step if chosen else 0)
            answer = [(chosen, "")]
        except CheckpointError as error:
            answer = [(None, str(error))]
    dist.broadcast_object_list(answer)
    found, problem = answer[0]
    if problem:
        raise CheckpointError(problem)
    if found is None:
        return 0
    if (found.world_size, found.zero_stage) != (world_size, job.section.zero_stage):
        raise CheckpointError(
            f"{job.checkpoints} was written by {found.world_size} ranks at ZeRO stage {found.zero_stage}, but this run has {world_size} "
            f"ranks at stage {job.section.zero_stage}; set student.num_workers and student.zero_stage back, or start in a new run directory"
        )
    if found.fingerprint != job.recipe.fingerprint:
        raise CheckpointError(
            f"{job.checkpoints} belongs to recipe {found.fingerprint[:16]}, not {job.recipe.fingerprint[:16]}; use a new run directory"
        )
    return found.step


def _commit(engine: StudentEngine, job: TrainJob, step: int, journal: Tracker | None) -> None:
    began = monotonic()
    engine.save(job.checkpoints, step=step)
    dist.barrier()
    if journal is not None:
        made = checkpoint.commit(
            job.checkpoints,
            step=step,
            world_size=dist.get_world_size(),
            zero_stage=job.section.zero_stage,
            fingerprint=job.recipe.fingerprint,
        )
        checkpoint.retain(job.checkpoints, job.section.keep_checkpoints)
        journal.record(CheckpointRow(role=job.role, step=step, seconds=monotonic() - began, num_bytes=made.num_bytes))
    dist.barrier()
