"""One run that everything happens to: teachers and machines are lost, a link is cut, ranks die and
hang, and at last all but a bucket.

A moment is never left to luck where a test depends on it: requests on their way to the bucket are
held until it has come.
"""

import random
from pathlib import Path
from time import sleep

import psutil

from helpers.faults import Fault, publications
from helpers.ranks import RankGroup
from helpers.scene import EPOCH, HUB, LEFT, RIGHT, Scene
from helpers.training import train_and_tell
from helpers.world import TinyWorld
from stillhouse import pipeline
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore
from stillhouse.tracking import CheckpointEvent, RecoveryEvent, RunEvent, TrainEvent, read_journal

TEACHERS = (LEFT, RIGHT)
NUM_CHUNKS_AT_A_TIME = 20  # that the students may read between two blows
WATCHDOG_S = 6.0


class Disaster:
    """The run, what happens to it, and what it leaves."""

    def __init__(self, scene: Scene, world: TinyWorld, folder: Path, *, bucket: str) -> None:
        self.scene, self.world, self.folder, self.bucket = scene, world, folder, bucket
        self.plan: Plan = scene.plan(
            world, folder / "run", store={"url": f"s3://{bucket}/casks"}, student=self.students()
        )
        self.store = ChunkStore(self.plan.config.store.url, self.plan.recipe)
        self._limit: Fault | None = None
        self.hold(*TEACHERS)
        self.let_read(0)
        self.run = scene.run(self.plan)

        self.num_deaths = 0
        self.num_unpublished = (
            0  # chunks that were made, and lost with their teachers at the bucket's door
        )
        self.published_by_the_joined: list[int] = []
        self.orphan = -1  # the chunk that a teacher was about to publish when it was cut off
        self.stopped: psutil.Process | None = None
        self.events: list[RunEvent] = []  # of the run directory, until it was lost
        self.events_elsewhere: list[RunEvent] = []  # of the one that was begun then

    def students(self) -> dict[str, object]:
        """What all that goes on with this run says of its students."""
        return {
            "num_workers": 2,
            "checkpoint_every_steps": 4,
            "checkpoint_url": f"s3://{self.bucket}/commits",
            "watchdog_s": WATCHDOG_S,
        }

    def hold(self, *names: str) -> None:
        """From now on the publications of these machines' teachers wait."""
        for name in names:
            self.scene.s3[name].hold(publications())

    def let_publish(self, *names: str) -> None:
        for name in names:
            self.scene.s3[name].end()

    def held(self, name: str) -> list[int]:
        """The chunks whose publications wait."""
        return [request.chunk for request in self.scene.s3[name].held if request.chunk is not None]

    def published(self, name: str) -> list[int]:
        """The chunks of this run that the machine's teachers have offered to the bucket."""
        found = [
            each
            for each in self.scene.s3[name].passed
            if each.method == "PUT" and each.path.startswith(f"/{self.bucket}/")
        ]
        return [request.chunk for request in found if request.chunk is not None]

    def until_both_are_held(self) -> None:
        self.run.until(lambda: all(self.held(name) for name in TEACHERS))

    def kill_teacher(self, name: str) -> None:
        self.scene.teacher(name).kill()
        self.num_deaths += 1

    def let_read(self, num_chunks: int) -> None:
        """The ranks may read so many chunks at the front of the reading order; for those behind
        they wait."""
        allowed, before = set(self.plan.chunks[:num_chunks]), self._limit
        way = self.scene.s3[HUB]
        self._limit = way.hold(
            lambda request: (
                request.method == "GET"
                and request.chunk is not None
                and request.chunk not in allowed
            )
        )
        if before is not None:
            way.end(before)

    def until_they_wait(self) -> None:
        """The ranks, for chunks, having committed."""
        self.run.until(lambda: bool(self.scene.s3[HUB].held) and self._has_committed())

    def _has_committed(self) -> bool:
        return any(isinstance(event, CheckpointEvent) for event in self.run.events)

    def until_recovered(self, cause: str) -> None:
        self.run.until(
            lambda: any(
                isinstance(event, RecoveryEvent) and event.cause == cause
                for event in self.run.events
            )
        )


def live_through(disaster: Disaster, rng: random.Random, *, long_form: bool) -> None:
    """All of it; who suffers, and when, is drawn. Where there is time, teachers die alone at other
    moments, too."""
    try:
        first, second = rng.sample(TEACHERS, 2)
        disaster.until_both_are_held()
        kill_before_the_put(disaster, first)
        lose_a_machine_after_the_put(disaster, second)
        if long_form:
            disaster.until_both_are_held()
            kill_after_the_put(disaster, second)
            disaster.until_both_are_held()
            kill_between(disaster, first, rng)
        cut_a_machine_off(disaster, second, other=first)
        for number, strike in enumerate((None, lose_a_rank, stop_a_rank), start=1):
            disaster.let_read(number * NUM_CHUNKS_AT_A_TIME)
            if strike is not None:
                sleep(rng.uniform(0.0, 0.5))  # somewhere in a step, in a checkpoint, or behind both
                strike(disaster, rng)
            disaster.until_they_wait()
        disaster.run.until(lambda: len(disaster.store.published()) == len(disaster.plan.chunks))
        lose_everything(disaster)
    finally:
        for way in disaster.scene.s3.values():
            way.end()


def kill_before_the_put(disaster: Disaster, name: str) -> None:
    disaster.kill_teacher(name)
    disaster.run.until(lambda: not disaster.held(name))
    disaster.num_unpublished += 1


def kill_after_the_put(disaster: Disaster, name: str) -> None:
    publish_and_say_nothing(disaster, name)
    disaster.kill_teacher(name)


def lose_a_machine_after_the_put(disaster: Disaster, name: str) -> None:
    """With all that lives on it; and get another, whose teacher publishes."""
    publish_and_say_nothing(disaster, name)
    teacher = disaster.scene.teacher(name)
    disaster.scene.cluster.kill_node(name)
    teacher.kill()
    disaster.num_deaths += 1
    disaster.scene.join(name)
    disaster.until_both_are_held()
    num_before = len(disaster.published(name))
    disaster.let_publish(name)
    disaster.run.until(lambda: len(disaster.published(name)) > num_before)
    disaster.hold(name)
    disaster.published_by_the_joined = disaster.published(name)[num_before:]


def publish_and_say_nothing(disaster: Disaster, name: str) -> None:
    """The chunk is in the bucket, but its teacher stands still before it can say so."""
    chunk = disaster.held(name)[0]
    disaster.scene.teacher(name).suspend()
    disaster.let_publish(name)
    disaster.run.until(lambda: chunk in disaster.published(name))
    disaster.hold(name)


def kill_between(disaster: Disaster, name: str, rng: random.Random) -> None:
    """Somewhere in its work; then all wait again."""
    goal = len(disaster.published(name)) + rng.randint(2, 5)
    disaster.let_publish(*TEACHERS)
    disaster.run.until(lambda: len(disaster.published(name)) >= goal)
    sleep(rng.uniform(0.0, 0.1))
    disaster.kill_teacher(name)
    disaster.hold(*TEACHERS)
    disaster.until_both_are_held()


def cut_a_machine_off(disaster: Disaster, name: str, *, other: str) -> None:
    """Its teacher lives on, and reaches the bucket. The run gives it up; another publishes the
    chunk in its hands, and then it does."""
    disaster.until_both_are_held()
    disaster.orphan = disaster.held(name)[0]
    disaster.scene.cut_off(name)
    disaster.num_deaths += 1
    disaster.let_publish(other)
    disaster.run.until(lambda: disaster.orphan in disaster.published(other))
    disaster.let_publish(name)
    disaster.run.until(lambda: disaster.orphan in disaster.published(name))


def lose_a_rank(disaster: Disaster, rng: random.Random) -> None:
    rng.choice(disaster.scene.ranks()).kill()
    disaster.until_recovered("died")


def stop_a_rank(disaster: Disaster, rng: random.Random) -> None:
    disaster.stopped = rng.choice(disaster.scene.ranks())
    disaster.stopped.suspend()
    disaster.until_recovered("stalled")


def lose_everything(disaster: Disaster) -> None:
    """The driver, the cluster and the run directory; what is left is in the bucket."""
    disaster.run.command.kill()
    disaster.scene.cluster.lose()
    disaster.events = disaster.run.events
    disaster.plan.run_dir.rename(disaster.folder / "out of reach")


def go_on_elsewhere(disaster: Disaster, ranks: RankGroup | None) -> None:
    """The same run in a directory of its own, by the test session's cluster or by these ranks
    alone."""
    run_dir = disaster.folder / "elsewhere"
    plan = disaster.world.plan(
        run_dir, store={"url": disaster.store.url}, student=EPOCH | disaster.students()
    )
    assert plan.recipe == disaster.plan.recipe
    if ranks is None:
        pipeline.run(plan)
        disaster.events_elsewhere = read_journal(run_dir / "journal.jsonl")
    else:
        disaster.events_elsewhere = [*ranks.call(train_and_tell, plan.jobs[0])[0]]


def steps_of(events: list[RunEvent]) -> list[int]:
    """The steps taken, in order; those that were lost come again."""
    return [event.step for event in events if isinstance(event, TrainEvent)]


def last_commit_of(events: list[RunEvent]) -> int:
    return max((event.step for event in events if isinstance(event, CheckpointEvent)), default=0)
