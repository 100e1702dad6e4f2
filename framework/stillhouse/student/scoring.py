"""Scoring a student on held-out text between two optimiser steps: every rank takes part, and rank 0
journals the scores. Until a training stops early, it is the same with them and without them."""

from dataclasses import asdict, dataclass
from time import monotonic

import torch
import torch.distributed as dist

from stillhouse.retry import Tell
from stillhouse.store.object_store import Blobs
from stillhouse.student.best import History, agreed_history, write_history
from stillhouse.student.engine import StudentEngine
from stillhouse.student.heartbeat import DriverLink
from stillhouse.student.heldout import HeldoutTeacher, read_heldout
from stillhouse.student.job import HeldoutPlan, TrainJob
from stillhouse.tracking import HeldoutEvent, Tracker


@dataclass(slots=True)
class HeldoutScorer:
    """Scores an engine's student beside what was published of its teacher, and decides by the
    scores: the same on every rank. `begin`, `score_at_begin` and `score_if_due` are collectives.
    Of a job without a plan for it, it scores nothing.

    The teacher's head is on the device only while it is used.
    """

    job: TrainJob
    resumed: int
    device: torch.device
    journal: Tracker
    link: DriverLink
    on_outage: Tell
    teacher: HeldoutTeacher | None
    history: History

    @classmethod
    def begin(
        cls,
        job: TrainJob,
        *,
        resumed: int,
        device: torch.device,
        journal: Tracker,
        link: DriverLink,
        on_outage: Tell,
    ) -> "HeldoutScorer":
        """Read the files that the job's plan names, as they count for a training that resumes from
        this step. Raises as `read_heldout` and `agreed_history` do."""
        history, plan = History(), job.heldout
        if plan is None:
            return cls(job, resumed, device, journal, link, on_outage, None, history)
        link.at(0, "commit")  # a store may be waited for
        root = Blobs(job.checkpoints_root)
        if plan.decides:
            key, is_reader = plan.history_key(job.role), dist.get_rank() == 0
            history = agreed_history(root, key, is_reader=is_reader, tell=on_outage).until(resumed)
        teacher = read_heldout(root, plan.key, tell=on_outage)
        link.at(0, "start")
        return cls(job, resumed, device, journal, link, on_outage, teacher, history)

    def score_at_begin(self, engine: StudentEngine) -> None:
        """Score a student before its first step."""
        if self.resumed == 0:
            self.score_if_due(engine, 0)

    def score_if_due(self, engine: StudentEngine, step: int) -> bool:
        """Score the student after `step` optimiser steps, where the plan wants it then. Whether
        this state has to be committed: it is the best so far, and is kept, or the last."""
        plan, teacher = self.job.heldout, self.teacher
        if plan is None or teacher is None:
            return False
        if plan.is_due(step, total_steps=self.job.total_steps):
            self._score(engine, step, plan, teacher)
        return self.is_over or self.best_until(step) == step

    @property
    def is_over(self) -> bool:
        """Whether training stops here, although steps are left."""
        plan = self.job.heldout
        return plan is not None and self.history.is_over(patience=plan.patience)

    def best_until(self, step: int) -> int | None:
        """The best step up to this one, where its commit has to be kept."""
        plan, best = self.job.heldout, self.history.until(step).best
        return best[0] if plan is not None and plan.keep_best and best is not None else None

    def _score(
        self, engine: StudentEngine, step: int, plan: HeldoutPlan, teacher: HeldoutTeacher
    ) -> None:
        # rank 0 may still wait for the journal's disk
        self.link.at(step, "commit")
        dist.barrier()
        # every rank its own sequences
        began, rank = monotonic(), dist.get_rank()
        self.link.at(step, "evaluate")
        batches = teacher.to(self.device).batches(
            rank=rank,
            world_size=dist.get_world_size(),
            size=self.job.section.micro_batch_sequences,
            block_tokens=plan.block_tokens,
        )
        scores = engine.score(batches, step=step)
        # what follows from it, on every rank
        if step > 0:
            self.history = self.history.after(step, scores.kl)
        # rank 0 reports them
        if rank == 0:
            self.link.at(step, "commit")  # the journal's disk may be full
            seconds = monotonic() - began
            self.journal.record(
                HeldoutEvent(self.job.role, step, **asdict(scores), seconds=seconds)
            )
            if plan.decides:
                root, key = Blobs(self.job.checkpoints_root), plan.history_key(self.job.role)
                write_history(root, key, self.history, tell=self.on_outage)
