"""A student's ranks die and hang, its driver is killed, and at last every machine is lost: each time it goes on from its last commit.

Processes take seconds to start. So one run lives through it all, and the tests look at what it left.
"""

import random
import shutil
from pathlib import Path

import psutil
import pytest

from helpers.faults import Fault
from helpers.scene import EPOCH, HUB, Scene, Undisturbed, curve, make_bucket, put
from helpers.world import TinyWorld
from stillhouse import pipeline
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore
from stillhouse.tracking import CheckpointRow, EndRow, RecoveryRow, Row, StallRow, StartRow, TrainRow, read_journal

pytestmark = pytest.mark.timeout(900)  # of which most goes to starting processes, on a machine that others may use

COMMIT_EVERY = 4


class Disaster:
    """One run, whose students read no further than they are let, and what it left. Another command may have to go on with it."""

    def __init__(self, scene: Scene, made: Plan, bucket: str) -> None:
        self.scene, self.made, self.bucket = scene, made, bucket
        self.run = scene.run(made)
        self.attempt = 1
        self.limit: Fault | None = None  # of what they may read
        self.stopped: list[psutil.Process] = []
        self.rows: list[Row] = []  # of the run directory, until it was lost
        self.rows_elsewhere: list[Row] = []  # of the one that was begun then

    def read_to(self, step: int) -> None:
        """Let the ranks take their steps up to this one, which ends a group of chunks, and wait until they have, with a commit before."""
        position = {number: position for position, number in enumerate(self.made.chunks)}
        way = self.scene.s3[HUB]
        before = self.limit
        self.limit = way.hold(lambda request: request.method == "GET" and request.chunk is not None and position[request.chunk] >= step)
        if before is not None:
            way.end(before)
        self.run.until(lambda: self.has_taken(step))

    def has_taken(self, step: int) -> bool:
        by_attempt = steps_by_attempt(self.run.rows)
        commits = [row.step for row in self.run.rows if isinstance(row, CheckpointRow)]
        return len(by_attempt) == self.attempt and step in by_attempt[-1] and max(commits, default=0) == step // COMMIT_EVERY * COMMIT_EVERY

    @property
    def recoveries(self) -> list[RecoveryRow]:
        return [row for row in self.rows or self.run.rows if isinstance(row, RecoveryRow)]

    def a_rank(self, rng: random.Random) -> psutil.Process:
        return rng.choice(self.scene.cluster.workers(HUB, "ray::RayTrainWorker"))


def lose_a_rank(disaster: Disaster, rng: random.Random) -> None:
    disaster.a_rank(rng).kill()
    disaster.run.until(lambda: len(disaster.recoveries) == 1)


def stop_a_rank(disaster: Disaster, rng: random.Random) -> None:
    rank = disaster.a_rank(rng)
    rank.suspend()
    disaster.stopped.append(rank)
    disaster.run.until(lambda: len(disaster.recoveries) == 2)


def kill_the_driver(disaster: Disaster) -> None:
    disaster.run.command.kill()
    disaster.run = disaster.scene.run(disaster.made)
    disaster.attempt += 1


def lose_everything(disaster: Disaster) -> None:
    """The driver, the cluster and the run directory; what is left is in the bucket."""
    disaster.run.command.kill()
    disaster.scene.cluster.lose()
    disaster.rows = disaster.run.rows
    shutil.rmtree(disaster.made.run_dir)


def go_on_elsewhere(disaster: Disaster, world: TinyWorld, run_dir: Path) -> None:
    """The same run on another cluster, in a directory of its own."""
    made = world.plan(run_dir, store={"url": f"s3://{disaster.bucket}/casks"}, student=EPOCH | students_of(disaster.bucket))
    assert made.recipe == disaster.made.recipe
    pipeline.run(made)
    disaster.rows_elsewhere = read_journal(run_dir / "journal.jsonl")


def live_through_it(disaster: Disaster, rng: random.Random) -> None:
    disaster.read_to(22)
    lose_a_rank(disaster, rng)
    stop_a_rank(disaster, rng)
    disaster.read_to(42)
    kill_the_driver(disaster)
    disaster.read_to(62)
    lose_everything(disaster)


def students_of(bucket: str) -> dict[str, object]:
    return {"num_workers": 2, "checkpoint_every_steps": COMMIT_EVERY, "watchdog_s": 10.0, "checkpoint_url": f"s3://{bucket}/commits"}


@pytest.fixture(scope="module")
def disaster(
    scene: Scene, tiny_world: TinyWorld, undisturbed: Undisturbed, chaos_seed: int, tmp_path_factory: pytest.TempPathFactory
) -> Disaster:
    bucket, folder = f"students-{chaos_seed}", tmp_path_factory.mktemp("students")
    make_bucket(bucket)
    made = scene.plan(tiny_world, folder / "run", store={"url": f"s3://{bucket}/casks"}, student=students_of(bucket))
    store = ChunkStore.create(made.config.store.url, made.recipe)
    for number in made.chunks:
        put(bucket, f"casks/{store.key(number)}", undisturbed.chunk(number))
    scene.make_whole()
    disaster = Disaster(scene, made, bucket)
    try:
        live_through_it(disaster, random.Random(chaos_seed))
    finally:
        scene.s3[HUB].end()
    go_on_elsewhere(disaster, tiny_world, folder / "elsewhere")
    return disaster


def test_whatever_was_lost_every_step_of_the_epoch_is_the_undisturbed_runs(disaster: Disaster, undisturbed: Undisturbed) -> None:
    """Bit by bit. A step that was lost with what came after the last commit is taken again."""
    assert curve([*disaster.rows, *disaster.rows_elsewhere]) == undisturbed.curves[2]
    end = disaster.rows_elsewhere[-1]
    assert isinstance(end, EndRow)
    assert end.outcome == "done"


def test_a_lost_rank_costs_the_steps_since_the_last_commit(disaster: Disaster) -> None:
    lost = disaster.recoveries[0]
    assert (lost.cause, lost.resumed_step, lost.lost_steps, lost.world_size) == ("died", 20, 2, 2)


def test_a_rank_that_hangs_is_found_and_replaced(disaster: Disaster) -> None:
    (stall,) = [row for row in disaster.rows if isinstance(row, StallRow)]
    assert stall.seconds >= disaster.made.config.student.watchdog_s
    assert [row.cause for row in disaster.recoveries] == ["died", "stalled"]
    assert not any(rank.is_running() for rank in disaster.stopped)


def test_a_killed_driver_is_started_again_with_the_same_command(disaster: Disaster) -> None:
    first, second = steps_by_attempt(disaster.rows)
    assert first[-1] == 42
    assert second == list(range(41, 63))


def test_when_everything_is_lost_the_run_goes_on_from_the_bucket(disaster: Disaster) -> None:
    (steps,) = steps_by_attempt(disaster.rows_elsewhere)
    assert steps == list(range(61, disaster.made.total_steps + 1))


def steps_by_attempt(rows: list[Row]) -> list[list[int]]:
    """The steps that each attempt took, in order."""
    found: list[list[int]] = []
    for row in rows:
        if isinstance(row, StartRow):
            found.append([])
        elif isinstance(row, TrainRow):
            found[-1].append(row.step)
    return found
