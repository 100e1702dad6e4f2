"""A student's machines come and go, each time announced: no step is lost, and the losses are those
of ranks that never changed.

Processes take seconds to start. So one run lives through it all, and the tests look at what it
left.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from time import time
from typing import TypeVar

import numpy as np
import pytest

from helpers.faults import Fault
from helpers.history import require_kept
from helpers.scene import EPOCH, LEFT, RIGHT, LiveRun, Scene, Undisturbed, curve, make_bucket, put
from helpers.world import TinyWorld
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore
from stillhouse.student.loader import steps_in_a_stretch
from stillhouse.tracking import (
    CheckpointEvent,
    EndEvent,
    NoticeEvent,
    RecoveryEvent,
    RunEvent,
    TrainEvent,
)

# of which most goes to starting processes, on a machine that others may use
pytestmark = pytest.mark.timeout(900)

AnyEvent = TypeVar("AnyEvent", bound=RunEvent)

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

    def __init__(self, scene: Scene, plan: Plan) -> None:
        self.scene, self.plan = scene, plan
        self.stops: list[int] = []  # the steps at which the ranks were made to wait
        self._limits: dict[str, Fault] = {}
        self.let_read(0)
        self.run: LiveRun = scene.run(plan)
        self.exit_code: int | None = None

    def read(self, num_chunks: int) -> None:
        """Let the ranks read so many chunks, and wait until they have taken every step for which
        these suffice."""
        self.let_read(num_chunks)
        self.stops.append(self._last_step_within(set(self.plan.chunks[:num_chunks])))
        self.run.until(lambda: self.last_step == self.stops[-1])

    @property
    def last_step(self) -> int:
        return max((row.step for row in self.of(TrainEvent)), default=0)

    def of(self, kind: type[AnyEvent]) -> list[AnyEvent]:
        return [row for row in self.run.events if isinstance(row, kind)]

    def let_read(self, num_chunks: int) -> None:
        allowed = set(self.plan.chunks[:num_chunks])
        for name in (LEFT, RIGHT):
            way = self.scene.s3[name]
            before = self._limits.get(name)
            self._limits[name] = way.hold(
                lambda request: (
                    request.method == "GET"
                    and request.chunk is not None
                    and request.chunk not in allowed
                )
            )
            if before is not None:
                way.end(before)

    def _last_step_within(self, chunks: set[int]) -> int:
        """A reader fetches the chunks of several steps together, counted from where its group
        began."""
        order, stretch = self.plan.order, steps_in_a_stretch(self.plan.order)
        begun = max((row.resumed_step for row in self.of(RecoveryEvent)), default=0)
        for first in range(begun, self.plan.total_steps, stretch):
            needed = (
                np.concatenate([order.sequences(step) for step in range(first, first + stretch)])
                // order.chunk_sequences
            )
            if not chunks.issuperset(needed.tolist()):
                return first
        return self.plan.total_steps


def lose_a_machine_on_notice(journey: Journey) -> None:
    journey.scene.metadata[RIGHT].announce(time() + 60.0)
    journey.run.until(
        lambda: any(row.step == journey.last_step for row in journey.of(CheckpointEvent))
    )
    journey.let_read(32)
    journey.run.until(lambda: len(journey.of(RecoveryEvent)) == 1)
    journey.scene.cluster.kill_node(RIGHT)


def get_another(journey: Journey) -> None:
    journey.scene.join(RIGHT)
    journey.run.until(lambda: len(journey.of(CheckpointEvent)) == 2)
    journey.let_read(42)
    journey.run.until(lambda: len(journey.of(RecoveryEvent)) == 2)


def tell_the_driver_to_go(journey: Journey) -> None:
    os.kill(journey.run.command.pid, signal.SIGTERM)
    journey.exit_code = journey.run.command.wait(timeout_s=120)


@pytest.fixture(scope="module")
def journey(
    scene: Scene,
    tiny_world: TinyWorld,
    undisturbed: Undisturbed,
    long_form: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Journey]:
    make_bucket(BUCKET)
    folder: Path = tmp_path_factory.mktemp("elastic")
    plan = tiny_world.plan(
        folder / "run",
        store={"url": f"s3://{BUCKET}/casks"},
        student=EPOCH | STUDENT,
        cluster={"address": scene.cluster.address, "notices": "aws"},
    )
    store = ChunkStore.create(plan.config.store.url, plan.recipe)
    for number in plan.chunks:
        put(BUCKET, f"casks/{store.key(number)}", undisturbed.chunk(number))
    scene.make_whole()
    journey = Journey(scene, plan)
    try:
        journey.read(22)
        lose_a_machine_on_notice(journey)
        journey.read(32)
        if long_form:
            get_another(journey)
            journey.read(42)
        tell_the_driver_to_go(journey)
        require_kept(
            journey.run.events,
            checkpoints={"student": f"s3://{BUCKET}/commits/student"},
            store=store,
        )
        yield journey
    finally:
        for name in (LEFT, RIGHT):
            scene.s3[name].end()


def test_every_step_is_taken_once_and_loses_what_it_would_on_ranks_that_never_changed(
    journey: Journey, undisturbed: Undisturbed
) -> None:
    steps = journey.of(TrainEvent)
    assert [row.step for row in steps] == list(range(1, journey.stops[-1] + 1))
    for (step, loss, norm), (_, wanted_loss, wanted_norm) in zip(
        curve(steps), undisturbed.curve, strict=False
    ):
        assert loss == pytest.approx(wanted_loss, rel=1e-6), step
        assert norm == pytest.approx(wanted_norm, rel=1e-5), step


def test_an_announced_end_is_journalled_and_the_group_goes_on_without_that_machine(
    journey: Journey,
) -> None:
    assert [(row.source, row.detail) for row in journey.of(NoticeEvent)][:1] == [
        ("aws", "spot instance-action terminate")
    ]
    shrunk = journey.of(RecoveryEvent)[0]
    assert (shrunk.cause, shrunk.world_size, shrunk.resumed_step, shrunk.lost_steps) == (
        "notice",
        1,
        journey.stops[0],
        0,
    )


@pytest.mark.long_form
def test_a_machine_that_comes_back_makes_the_group_whole_after_a_commit(journey: Journey) -> None:
    grown = journey.of(RecoveryEvent)[1]
    assert (grown.cause, grown.world_size, grown.lost_steps) == ("grown", 2, 0)
    alone = range(journey.stops[0] + 1, grown.resumed_step + 1)
    assert {row.step for row in journey.of(TrainEvent) if row.world_size == 1} == set(alone)


def test_a_driver_that_is_told_to_go_commits_the_last_step_first(journey: Journey) -> None:
    assert journey.exit_code == 143
    assert journey.of(CheckpointEvent)[-1].step == journey.stops[-1]
    assert journey.of(EndEvent)[-1].outcome == "interrupted"
