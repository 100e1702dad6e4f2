"""The ranks of a student are killed, stopped and sent away, and the training is the undisturbed one, bit for bit.

Ranks take seconds to start. So one training lives through all of it, and the tests look at what it left. It cannot outrun the test: the
chunks beyond a given place are kept from it until the disaster has happened.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, time

import pytest

from helpers.ranks import RankGroup
from helpers.training import train_and_tell
from helpers.world import TinyWorld
from stillhouse.board import Beat, Board, Summons
from stillhouse.cluster import Secrets, placement
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore
from stillhouse.student.job import TrainJob
from stillhouse.student.workers import fit
from stillhouse.tracking import CheckpointRow, Journal, RecoveryRow, Row, StallRow, TrainRow, latest_train_rows, read_journal

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_STEPS = 30
PATIENCE_S = 180.0
KILLED_AT, STOPPED_AT, SUMMONED_AT = 7, 14, 21  # chunks, about as many as steps, that the training gets to see before each disaster
STUDENT = {
    "num_workers": 2,
    "num_cpus": 0.25,
    "zero_stage": 2,
    "max_steps": NUM_STEPS,
    "checkpoint_every_steps": 3,
    "watchdog_s": 12.0,
    "prefetch_batches": 1,
}


@dataclass(frozen=True)
class Disasters:
    """A training that lived through them."""

    job: TrainJob
    rows: list[Row]
    stopped: Beat  # the rank that was stopped

    @property
    def recoveries(self) -> list[RecoveryRow]:
        return [row for row in self.rows if isinstance(row, RecoveryRow)]


@contextmanager
def kept_back(made: Plan, *, but: int) -> Iterator[None]:
    """All chunks behind the first `but` of the reading order are out of the readers' sight while the block lasts."""
    folder = Path(made.config.store.url)
    store = ChunkStore(made.config.store.url, made.recipe)
    paths = [path for number in made.chunks[but:] if (path := folder / store.key(number)).exists()]
    for path in paths:
        path.rename(path.with_suffix(".kept"))
    try:
        yield
    finally:
        for path in paths:
            path.with_suffix(".kept").rename(path)


class LiveTraining:
    def __init__(self, job: TrainJob, board: Board) -> None:
        self.job, self.board = job, board
        self._thread = ThreadPoolExecutor(1)
        self._future: Future[None] = self._thread.submit(self._fit)

    @property
    def rows(self) -> list[Row]:
        return read_journal(self.job.journal)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline, look = monotonic() + PATIENCE_S, threading.Event()
        while not condition():
            assert not self._future.done(), f"the training ended: {self._future.exception()!r}"
            assert monotonic() < deadline, self.rows[-3:]
            look.wait(0.1)

    def stands_behind(self, step: int) -> bool:
        """Whether all ranks have come further than the step, wait for chunks now, and have committed what was due."""
        beats = [each.beat for each in self.board.heard(self.job.role)]
        if len(beats) < 2 or any(beat.phase != "data" or beat.phase_s < 1.0 or beat.step <= step for beat in beats):
            return False
        taken, every = beats[0].step - 1, self.job.section.checkpoint_every_steps
        return any(isinstance(row, CheckpointRow) and row.step == taken - taken % every for row in self.rows)

    def has_recovered(self, times: int) -> bool:
        return sum(isinstance(row, RecoveryRow) for row in self.rows) >= times

    def rank(self, number: int) -> Beat:
        return next(each.beat for each in self.board.heard(self.job.role) if each.beat.rank == number)

    def result(self) -> None:
        self._future.result(timeout=PATIENCE_S)
        self._thread.shutdown()

    def _fit(self) -> None:
        fit(
            [self.job],
            where=placement(self.job.section, {"CPU": 4.0}),
            threads=1,
            secrets=Secrets(None),
            notices="off",
            board=self.board,
            teachers_at_work=True,
            journal=Journal(self.job.journal),
        )


@pytest.fixture(scope="module")
def disasters(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Disasters:
    folder = tmp_path_factory.mktemp("disasters")
    made = tiny_world.plan(folder / "run", student=STUDENT, store={"url": str(folder / "store")})
    made.run_dir.mkdir()
    tiny_world.fill_store(made)
    job = made.jobs()[0]
    with kept_back(made, but=SUMMONED_AT):
        with kept_back(made, but=STOPPED_AT):
            with kept_back(made, but=KILLED_AT):
                training = LiveTraining(job, Board.create())
                training.until(lambda: training.stands_behind(0))
                os.kill(training.rank(1).pid, signal.SIGKILL)
            training.until(lambda: training.has_recovered(1) and training.stands_behind(KILLED_AT))
            stopped = training.rank(0)
            os.kill(stopped.pid, signal.SIGSTOP)
            training.until(lambda: any(isinstance(row, StallRow) for row in training.rows))
        training.until(lambda: training.has_recovered(2) and training.stands_behind(STOPPED_AT))
        training.board.summon(job.role, Summons("notice", time() + 60.0, "aws: terminate"))
        training.until(lambda: committed_last(training))
    training.result()
    return Disasters(job, training.rows, stopped)


def committed_last(training: LiveTraining) -> bool:
    """Whether the last step that was taken is committed."""
    steps = [row.step for row in training.rows if isinstance(row, TrainRow)]
    return steps[-1] == max(row.step for row in training.rows if isinstance(row, CheckpointRow))


def test_every_loss_is_the_undisturbed_trainings(disasters: Disasters, rank_groups: dict[int, RankGroup], tmp_path: Path) -> None:
    undisturbed = rank_groups[2].call(train_and_tell, replace(disasters.job, run_dir=tmp_path))[0]
    ours = latest_train_rows(disasters.rows, "student")
    assert [row.step for row in ours] == list(range(1, NUM_STEPS + 1))
    assert [(row.loss, row.grad_norm) for row in ours] == [(row.loss, row.grad_norm) for row in undisturbed]


def test_a_killed_rank_costs_the_steps_since_the_last_commit_and_no_more(disasters: Disasters) -> None:
    recovery = disasters.recoveries[0]
    assert recovery.cause == "died"
    assert recovery.world_size == 2
    assert recovery.resumed_step % disasters.job.section.checkpoint_every_steps == 0
    assert 0 <= recovery.lost_steps < disasters.job.section.checkpoint_every_steps


def test_a_stopped_rank_is_named_by_the_watchdog_with_its_stack_and_replaced(disasters: Disasters) -> None:
    (stall,) = [row for row in disasters.rows if isinstance(row, StallRow)]
    assert (stall.role, stall.rank, stall.step) == ("student", disasters.stopped.rank, disasters.stopped.step)
    assert disasters.job.section.watchdog_s < stall.seconds < disasters.job.section.watchdog_s + 30
    assert "train.py" in stall.stack
    recovery = disasters.recoveries[1]
    assert recovery.cause == "stalled"
    assert f"rank {disasters.stopped.rank} was silent" in recovery.detail


def test_a_notice_has_the_last_step_committed_before_the_ranks_leave(disasters: Disasters) -> None:
    recovery = disasters.recoveries[2]
    assert (recovery.cause, recovery.detail) == ("notice", "aws: terminate")
    assert recovery.lost_steps == 0


def test_a_recovery_takes_seconds(disasters: Disasters) -> None:
    for row in disasters.recoveries:
        print(f"{row.cause}: {row.seconds:.1f} s")
    assert len(disasters.recoveries) == 3
