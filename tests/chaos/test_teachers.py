"""Teachers and their machines are lost at every moment of a run, and it ends as if nothing had happened.

Processes take seconds to start. So one run lives through it all, and the tests look at what it left.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import sleep

import numpy as np
import pytest

from helpers.faults import publications
from helpers.scene import LEFT, RIGHT, LiveRun, Scene, Undisturbed, contents, curve, make_bucket, times_written
from helpers.world import TinyWorld
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore
from stillhouse.tracking import PoolRow, TrainRow

pytestmark = pytest.mark.timeout(900)  # of which most goes to starting processes, on a machine that others may use

LEASES = 2  # that a teacher has at most
TEACHERS = (LEFT, RIGHT)


@dataclass
class Disaster:
    """One run, and what happened to it."""

    scene: Scene
    made: Plan
    run: LiveRun
    bucket: str
    num_deaths: int = 0
    num_unpublished: int = 0  # chunks that were made, and lost with their teachers at the bucket's door
    orphan: int = -1  # the chunk that a teacher was about to publish when it was cut off
    alive_when_it_was_made_again: list[str] = field(default_factory=list)
    published_by_the_joined: list[int] = field(default_factory=list)
    code: int = -1

    @property
    def store(self) -> ChunkStore:
        return ChunkStore(self.made.config.store.url, self.made.recipe)

    def hold(self, *names: str) -> None:
        """From now on the publications of these machines' teachers wait."""
        for name in names:
            self.scene.s3[name].hold(publications())

    def let_pass(self, *names: str) -> None:
        for name in names:
            self.scene.s3[name].end()

    def held(self, name: str) -> list[int]:
        """The chunks that wait."""
        return [request.chunk for request in self.scene.s3[name].held if request.chunk is not None]

    def published(self, name: str) -> list[int]:
        """The chunks of this run that the machine's teachers have offered to the bucket."""
        found = [each for each in self.scene.s3[name].passed if each.method == "PUT" and each.path.startswith(f"/{self.bucket}/")]
        return [request.chunk for request in found if request.chunk is not None]

    def both_hold_one(self) -> None:
        self.run.until(lambda: all(self.held(name) for name in TEACHERS))

    def kill_teacher(self, name: str) -> None:
        self.scene.teacher(name).kill()
        self.num_deaths += 1


def kill_before_the_put(disaster: Disaster, name: str) -> None:
    disaster.kill_teacher(name)
    disaster.run.until(lambda: not disaster.held(name))
    disaster.num_unpublished += 1


def kill_after_the_put(disaster: Disaster, name: str) -> None:
    """The chunk is in the bucket, but its teacher stands still before it can say so."""
    (chunk,) = disaster.held(name)
    disaster.scene.teacher(name).suspend()
    disaster.let_pass(name)
    disaster.run.until(lambda: chunk in disaster.published(name))
    disaster.hold(name)
    disaster.kill_teacher(name)


def kill_between(disaster: Disaster, name: str, rng: random.Random) -> None:
    """Somewhere in its work; then all wait again."""
    goal = len(disaster.published(name)) + rng.randint(2, 5)
    disaster.let_pass(*TEACHERS)
    disaster.run.until(lambda: len(disaster.published(name)) >= goal)
    sleep(rng.uniform(0.0, 0.1))
    disaster.kill_teacher(name)
    disaster.hold(*TEACHERS)


def lose_a_machine_and_get_another(disaster: Disaster, name: str) -> None:
    disaster.run.until(lambda: bool(disaster.held(name)))
    disaster.scene.cluster.kill_node(name)
    disaster.num_deaths += 1
    disaster.num_unpublished += 1
    disaster.scene.join(name)
    disaster.both_hold_one()
    num_before = len(disaster.published(name))
    disaster.let_pass(name)
    disaster.run.until(lambda: len(disaster.published(name)) > num_before)
    disaster.hold(name)
    disaster.published_by_the_joined = disaster.published(name)[num_before:]


def cut_a_machine_off(disaster: Disaster, name: str, *, other: str) -> None:
    """Its teacher goes on, and reaches the bucket. The run gives it up, and another makes the chunk that it has in hand."""
    disaster.both_hold_one()
    (disaster.orphan,) = disaster.held(name)
    disaster.scene.cut_off(name)
    disaster.num_deaths += 1
    disaster.let_pass(other)
    disaster.run.until(lambda: disaster.orphan in disaster.published(other))
    disaster.alive_when_it_was_made_again = [each for each in TEACHERS if disaster.scene.teacher(each).is_running()]
    disaster.let_pass(name)
    disaster.run.until(lambda: disaster.orphan in disaster.published(name))


def live_through_it(disaster: Disaster, rng: random.Random) -> None:
    first, second = rng.sample(TEACHERS, 2)
    disaster.both_hold_one()
    kill_before_the_put(disaster, first)
    kill_after_the_put(disaster, second)
    disaster.both_hold_one()
    kill_between(disaster, first, rng)
    lose_a_machine_and_get_another(disaster, second)
    cut_a_machine_off(disaster, second, other=first)


@pytest.fixture(scope="module")
def disaster(scene: Scene, tiny_world: TinyWorld, chaos_seed: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disaster]:
    bucket = f"teachers-{chaos_seed}"
    make_bucket(bucket)
    scene.make_whole()
    made = scene.plan(tiny_world, tmp_path_factory.mktemp("teachers") / "run", store={"url": f"s3://{bucket}/casks"})
    for name in TEACHERS:
        scene.s3[name].hold(publications())
    disaster = Disaster(scene, made, scene.run(made), bucket)
    try:
        live_through_it(disaster, random.Random(chaos_seed))
        disaster.code = disaster.run.command.wait(timeout_s=240)
        yield disaster
    finally:
        disaster.let_pass(*TEACHERS)


def test_every_chunk_is_published_once_and_is_the_undisturbed_runs(disaster: Disaster, undisturbed: Undisturbed) -> None:
    assert disaster.code == 0, disaster.run.command.words()
    keys = {disaster.store.key(number): number for number in disaster.made.chunks}
    written = {key.removeprefix("casks/"): times for key, times in times_written(disaster.bucket).items() if "/chunks/" in key}
    assert written == dict.fromkeys(keys, 1)
    for key, number in keys.items():
        assert contents(disaster.bucket, f"casks/{key}") == undisturbed.chunk(number)


def test_every_sequence_is_trained_once_and_the_losses_are_the_undisturbed_runs(disaster: Disaster, undisturbed: Undisturbed) -> None:
    trained = [row.step for row in disaster.run.rows if isinstance(row, TrainRow)]
    assert trained == list(range(1, disaster.made.total_steps + 1))
    order = disaster.made.order
    read = np.concatenate([order.sequences(step - 1) for step in trained])
    assert sorted(read.tolist()) == list(range(order.num_sequences))
    assert curve(disaster.run.rows) == undisturbed.curves[1]


def test_a_teachers_death_costs_its_leased_chunks_at_most(disaster: Disaster) -> None:
    num_offered = sum(len(disaster.published(name)) for name in TEACHERS) + disaster.num_unpublished
    num_hedged = max(row.hedged for row in disaster.run.rows if isinstance(row, PoolRow))
    assert num_offered - len(disaster.made.chunks) <= LEASES * disaster.num_deaths + num_hedged
    assert num_offered > len(disaster.made.chunks)  # or nothing died at work


def test_a_machine_that_joins_is_used(disaster: Disaster) -> None:
    assert disaster.published_by_the_joined


def test_two_teachers_that_cannot_see_each_other_publish_a_chunk_once(disaster: Disaster) -> None:
    assert disaster.alive_when_it_was_made_again == list(TEACHERS)
    assert all(disaster.orphan in disaster.published(name) for name in TEACHERS)
    assert times_written(disaster.bucket)[f"casks/{disaster.store.key(disaster.orphan)}"] == 1
