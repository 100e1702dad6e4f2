"""Ranks as processes of the test's own, to be killed: forked from one that has imported everything,
so that they start at once."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from helpers.training import CPU, Alone
from stillhouse.cluster.processes import prepare_process
from stillhouse.student.job import TrainJob
from stillhouse.student.train import train
from stillhouse.tracking import CheckpointEvent, Journal, RunEvent, TrainEvent

_JOIN_S = 120


@dataclass(frozen=True, slots=True)
class Halt:
    """Where rank 0 stands still: once it has journalled a row of this kind. The file `reached` says
    that it is there."""

    event: type[TrainEvent | CheckpointEvent]
    step: int  # or a later one
    reached: Path


@dataclass(frozen=True, slots=True)
class HaltingJournal:
    """A journal whose writer may stand still."""

    journal: Journal
    halt: Halt | None

    def record(self, event: RunEvent) -> None:
        self.journal.record(event)
        if (
            self.halt is not None
            and isinstance(event, self.halt.event)
            and event.step >= self.halt.step
        ):
            self.halt.reached.touch()
            threading.Event().wait()


class Mortals:
    """A gloo group that trains a job, each rank a process."""

    def __init__(
        self,
        job: TrainJob,
        *,
        world_size: int,
        environment: Mapping[str, str],
        halt: Halt | None = None,
    ) -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload([__name__, "helpers.holders"])
        # a free port might be taken before it is used
        meeting = f"file://{job.run_dir}/meeting-{uuid4().hex}"
        arguments = [
            (job, rank, world_size, meeting, dict(environment), halt) for rank in range(world_size)
        ]
        self._ranks = [forks.Process(target=_live, args=each, daemon=True) for each in arguments]
        for process in self._ranks:
            process.start()

    def kill(self, rank: int) -> None:
        """SIGKILL a rank that lives, and wait until it is gone."""
        self._end(rank)
        assert self._ranks[rank].exitcode == -signal.SIGKILL

    def kill_all(self) -> None:
        """What Ray Train does with the others of a group that lost a rank. Some may have ended by
        themselves."""
        for rank in range(len(self._ranks)):
            self._end(rank)

    def finish(self) -> None:
        """Wait until all ranks have ended well."""
        for process in self._ranks:
            process.join(_JOIN_S)
        assert [process.exitcode for process in self._ranks] == [0] * len(self._ranks)

    def _end(self, rank: int) -> None:
        process = self._ranks[rank]
        assert process.pid is not None
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join(_JOIN_S)
        assert not process.is_alive()


def _live(
    job: TrainJob,
    rank: int,
    world_size: int,
    meeting: str,
    environment: dict[str, str],
    halt: Halt | None,
) -> None:
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    prepare_process("cpu", 1)
    dist.init_process_group(
        "gloo",
        init_method=meeting,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=300),
    )
    train(
        job,
        device=CPU,
        journal=HaltingJournal(Journal(job.journal), halt if rank == 0 else None),
        link=Alone(),
    )
    dist.destroy_process_group()
