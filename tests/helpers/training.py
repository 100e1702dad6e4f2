"""What runs on the ranks of the training tests: the real training loop and the real engine, with the journal kept in memory."""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.models import load_model
from stillhouse.store import ChunkStore
from stillhouse.student.engine import StudentEngine
from stillhouse.student.job import TrainJob
from stillhouse.student.loader import BatchReader, refuse_bad_chunk
from stillhouse.student.train import train
from stillhouse.tracking import Row, TrainRow

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ListTracker:
    """A tracker that keeps its rows."""

    rows: list[Row] = field(default_factory=list)

    def record(self, row: Row) -> None:
        self.rows.append(row)


def train_and_tell(job: TrainJob) -> list[TrainRow]:
    """Train the job; rank 0's training rows, in order."""
    tracker = ListTracker()
    train(job, device=CPU, journal=tracker, board=None)
    return [row for row in tracker.rows if isinstance(row, TrainRow)]


def first_gradients(job: TrainJob) -> dict[str, Tensor]:
    """The full gradient of every parameter at the first step."""
    section = job.section
    world_size = dist.get_world_size()
    engine = StudentEngine(
        load_model(section, random_init_seed=section.seed),
        section=section,
        vocab_size=job.recipe.vocab_size,
        num_micro_batches=-(-section.global_batch_sequences // (world_size * section.micro_batch_sequences)),
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
    )
    with reader:
        batch, _ = reader.next()
        engine.accumulate(batch.micro_batches)
    gradients = engine.full_gradients()
    engine.close()
    return gradients


def with_student(job: TrainJob, **changes: object) -> TrainJob:
    """The job with other settings of its student, and a directory of its own."""
    section = job.section.model_copy(update=changes)
    name = "-".join(f"{key}-{value}" for key, value in changes.items())
    return replace(job, section=section, run_dir=job.run_dir / name)
