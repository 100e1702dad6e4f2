"""The training loop of a student: read, step, journal, commit.

A plain function of a job and an existing process group. It resumes by itself: where the job's directory holds a commit that verifies,
it goes on from there.
"""

from time import monotonic

import torch
import torch.distributed as dist

from stillhouse.cluster import Board
from stillhouse.errors import StudentError
from stillhouse.models import load_model
from stillhouse.store import ChunkStore
from stillhouse.student.engine import StudentEngine, learning_rate_at
from stillhouse.student.job import TrainJob
from stillhouse.student.loader import Batch, BatchReader, refuse_bad_chunk
from stillhouse.student.restore import restore
from stillhouse.student.universal import convert
from stillhouse.student.writer import CheckpointWriter, attempt_name
from stillhouse.tracking import CheckpointRow, Tracker, TrainRow


def train(job: TrainJob, *, device: torch.device, journal: Tracker, board: Board | None) -> None:
    """Train until `job.total_steps`, on every rank of the existing process group; commits checkpoints and journals from rank 0.

    With a `board`, cursors and damaged chunks are told to the teacher pool; without one a damaged chunk raises StudentError.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    section, order = job.section, job.order
    with restore(job.checkpoints, origin=job.origin, convert=convert) as found:
        done = found.step if found else 0
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
        if found is not None:
            engine.load(found)
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
    writer = CheckpointWriter(
        job.checkpoints,
        origin=job.origin,
        attempt=attempt_name(),
        rank=rank,
        world_size=world_size,
        keep=section.keep_checkpoints,
        on_commit=lambda made, seconds, blocking_s: journal.record(
            CheckpointRow(role=job.role, step=made.step, seconds=seconds, num_bytes=made.num_bytes, blocking_s=blocking_s)
        ),
    )
    due = False
    try:
        with reader, writer:
            for step in range(done, job.total_steps):
                row = _train_one(engine, reader, job, step)
                if rank == 0:
                    journal.record(row)
                    if board is not None:
                        board.move_cursor(job.role, order.chunks_finished(step + 1))
                last = step + 1 == job.total_steps
                due = due or last or (step + 1) % section.checkpoint_every_steps == 0
                if due and (last or not _on_any_rank(writer.busy, device)):
                    writer.submit(engine.snapshot(step + 1))
                    due = False
            writer.wait()
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


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is so on one rank at least."""
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())
