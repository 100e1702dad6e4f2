"""A student's machines come and go, each time announced: no step is lost, and the losses are those of ranks that never changed.

Processes take seconds to start. So one run lives through it all, and the tests look at what it left.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from time import time

import pytest

from helpers.scene import EPOCH, LEFT, RIGHT, LiveRun, Scene, Undisturbed, curve, make_bucket, put
from helpers.world import TinyWorld
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore
from stillhouse.tracking import CheckpointRow, EndRow, NoticeRow, RecoveryRow, Row, TrainRow

pytestmark = pytest.mark.timeout(900)  # of which most goes to starting processes, on a machine that others may use

BUCKET = "elastic"
STUDENT = {
    "num_workers": 2,
    "min_workers": 1,
    "resources": {"rank": 1.0},
    "zero_stage": 2,
    "checkpoint_every_steps": 1000,  # nothing is committed but on notice
    "checkpoint_url": f"s3://{BUCKET}/commits",
    "regroup_s": 3.0,
}


class Journey:
    """A run whose ranks read no further than they are let."""

    def __init__(self, scene: Scene, made: Plan) -> None:
        self.scene, self.made = scene, made
        self._position = {number: position for position, number in enumerate(made.chunks)}
        self._limits = self._limited_to(22)
        self.run: LiveRun = scene.run(made)
        self.exit_code: int | None = None

    def read_to(self, step: int) -> None:
        """Let the ranks take their steps up to this one, which ends a group of chunks, and wait until they have."""
        before, self._limits = self._limits, self._limited_to(step)
        for name, fault in before.items():
            self.scene.s3[name].end(fault)
        self.run.until(lambda: self.last_step == step)

    @property
    def last_step(self) -> int:
        return max((row.step for row in self.of(TrainRow)), default=0)

    def of(self, kind: type[Row]) -> list:
        return [row for row in self.run.rows if isinstance(row, kind)]

    def _limited_to(self, step: int) -> dict:
        return {
            name: self.scene.s3[name].hold(
                lambda request: request.method == "GET" and request.chunk is not None and self._position[request.chunk] >= step
            )
            for name in (LEFT, RIGHT)
        }


def lose_a_machine_on_notice(journey: Journey) -> None:
    journey.scene.metadata[RIGHT].announce(time() + 60.0)
    journey.run.until(lambda: any(row.step == journey.last_step for row in journey.of(CheckpointRow)))
    journey.scene.cluster.kill_node(RIGHT)
    journey.run.until(lambda: len(journey.of(RecoveryRow)) == 1)


def get_another(journey: Journey) -> None:
    journey.scene.join(RIGHT)
    journey.run.until(lambda: len(journey.of(RecoveryRow)) == 2)


def tell_the_driver_to_go(journey: Journey) -> None:
    os.kill(journey.run.command.pid, signal.SIGTERM)
    journey.exit_code = journey.run.command.wait(timeout_s=120)


@pytest.fixture(scope="module")
def journey(scene: Scene, tiny_world: TinyWorld, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    make_bucket(BUCKET)
    folder: Path = tmp_path_factory.mktemp("elastic")
    made = tiny_world.plan(
        folder / "run",
        store={"url": f"s3://{BUCKET}/casks"},
        student=EPOCH | STUDENT,
        cluster={"address": scene.cluster.address, "notices": "aws"},
    )
    store = ChunkStore.create(made.config.store.url, made.recipe)
    for number in made.chunks:
        put(BUCKET, f"casks/{store.key(number)}", undisturbed.chunk(number))
    scene.make_whole()
    journey = Journey(scene, made)
    try:
        journey.read_to(22)
        lose_a_machine_on_notice(journey)
        journey.read_to(32)
        get_another(journey)
        journey.read_to(42)
        tell_the_driver_to_go(journey)
        yield journey
    finally:
        for name in (LEFT, RIGHT):
            scene.s3[name].end()


def test_every_step_is_taken_once_and_loses_what_it_would_on_ranks_that_never_changed(journey: Journey, undisturbed: Undisturbed) -> None:
    steps = journey.of(TrainRow)
    assert [row.step for row in steps] == list(range(1, 43))
    for (step, loss, norm), (_, wanted_loss, wanted_norm) in zip(curve(steps), undisturbed.curve[:42], strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-6), step
        assert norm == pytest.approx(wanted_norm, rel=1e-5), step


def test_an_announced_end_is_journalled_and_the_group_goes_on_without_that_machine(journey: Journey) -> None:
    assert [(row.source, row.detail) for row in journey.of(NoticeRow)][:1] == [("aws", "terminate")]
    shrunk = journey.of(RecoveryRow)[0]
    assert (shrunk.cause, shrunk.world_size, shrunk.resumed_step, shrunk.lost_steps) == ("notice", 1, 22, 0)


def test_a_machine_that_comes_back_makes_the_group_whole_after_a_commit(journey: Journey) -> None:
    grown = journey.of(RecoveryRow)[1]
    assert (grown.cause, grown.world_size, grown.lost_steps) == ("grown", 2, 0)
    assert [row.world_size for row in journey.of(TrainRow)] == [2] * 22 + [1] * (grown.resumed_step - 22) + [2] * (42 - grown.resumed_step)


def test_a_driver_that_is_told_to_go_commits_the_last_step_first(journey: Journey) -> None:
    assert journey.exit_code == 143
    assert journey.of(CheckpointRow)[-1].step == 42
    end = journey.of(EndRow)[-1]
    assert end.outcome == "interrupted"
