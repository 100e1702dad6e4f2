"""Scoring a student on held-out text between two optimiser steps: every rank takes part, and rank 0
journals the scores. Training is the same with it and without it."""

from dataclasses import asdict
from time import monotonic

import torch
import torch.distributed as dist

from stillhouse.retry import Tell
from stillhouse.store.object_store import Blobs
from stillhouse.student.engine import StudentEngine
from stillhouse.student.heartbeat import DriverLink
from stillhouse.student.heldout import HeldoutTeacher, read_heldout
from stillhouse.student.job import HeldoutPlan, TrainJob
from stillhouse.tracking import HeldoutEvent, Tracker


class HeldoutScorer:
    """Scores an engine's student beside what was published of its teacher. Both methods are
    collectives: every rank calls them in the same order.

    The teacher's head is on the device only while it is used.
    """

    def __init__(
        self,
        plan: HeldoutPlan,
        job: TrainJob,
        *,
        device: torch.device,
        journal: Tracker,
        link: DriverLink,
        on_outage: Tell,
    ) -> None:
        """Reads the file that the plan names, and raises as `read_heldout` does."""
        self._plan, self._job, self._device = plan, job, device
        self._journal, self._link = journal, link
        link.at(0, "commit")  # a store may be waited for
        root = Blobs(job.checkpoints_root)
        self._teacher: HeldoutTeacher = read_heldout(root, plan.key, tell=on_outage)
        link.at(0, "start")

    def score_if_due(self, engine: StudentEngine, step: int) -> None:
        """Score the student after `step` optimiser steps, where the plan wants it then."""
        if self._plan.is_due(step, total_steps=self._job.total_steps):
            self._score(engine, step)

    def _score(self, engine: StudentEngine, step: int) -> None:
        # every rank its own sequences
        began, rank = monotonic(), dist.get_rank()
        self._link.at(step, "evaluate")
        batches = self._teacher.to(self._device).batches(
            rank=rank,
            world_size=dist.get_world_size(),
            size=self._job.section.micro_batch_sequences,
            block_tokens=self._plan.block_tokens,
        )
        scores = engine.score(batches, step=step)
        # rank 0 reports them
        if rank == 0:
            self._link.at(step, "commit")  # the journal's disk may be full
            seconds = monotonic() - began
            self._journal.record(
                HeldoutEvent(self._job.role, step, **asdict(scores), seconds=seconds)
            )
