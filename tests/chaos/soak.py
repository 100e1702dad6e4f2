"""Two runs that something happens to once a minute, drawn from a seed; then one undisturbed, which
has to have the losses of both.

    PYTHONPATH=tests python -m chaos.soak --minutes 20 --seed 0

In the first, of half the time, only teachers and their machines suffer; in the second everything
does. Prints what happened, how each run went on and how much of the time was useful; exit code 1
where anything was lost, done twice or different.
"""

import argparse
import logging
import os
import random
import secrets
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

from helpers.faults import everything
from helpers.history import Left, chunks_in, commits_in, told_in, violations
from helpers.models import make_model
from helpers.s3 import s3_server
from helpers.scene import (
    LEFT,
    RIGHT,
    LiveRun,
    Scene,
    contents,
    curve,
    make_bucket,
    put,
    times_written,
)
from helpers.world import TinyWorld
from stillhouse.pipeline import Plan
from stillhouse.report.goodput import PARTS, incidents, recoveries, student_time, teacher_time
from stillhouse.report.summary import summarise
from stillhouse.store import ChunkStore
from stillhouse.tracking import TrainEvent

EVERY_S = 60.0
MACHINES = (LEFT, RIGHT)


class Soak:
    """The run, and what has happened to it."""

    def __init__(
        self, scene: Scene, world: TinyWorld, folder: Path, rng: random.Random, *, name: str
    ) -> None:
        self.scene, self.rng, self.bucket = scene, rng, f"soak-{name}"
        make_bucket(self.bucket)
        self.plan = plan_of(scene, world, folder / name, bucket=self.bucket, max_steps=None)
        self.store = ChunkStore(self.plan.config.store.url, self.plan.recipe)
        self.run = scene.run(self.plan)
        self.struck: Counter[str] = Counter()
        self.damaged: set[int] = set()
        self._to_come: list[Callable[[Soak], None]] = []

    def kill_teacher(self) -> None:
        self.scene.teacher(self.rng.choice(MACHINES)).kill()

    def lose_machine(self) -> None:
        name = self.rng.choice(MACHINES)
        self.scene.cluster.kill_node(name)
        sleep(self.rng.uniform(0, 10))
        self.scene.join(name)

    def cut_machine_off(self) -> None:
        self.scene.cut_off(self.rng.choice(MACHINES))
        sleep(self.rng.uniform(0, 10))
        self.scene.make_whole()

    def kill_rank(self) -> None:
        self.rng.choice(self.scene.ranks()).kill()

    def stop_rank(self) -> None:
        self.rng.choice(self.scene.ranks()).suspend()

    def refuse_requests(self) -> None:
        seconds, status = self.rng.uniform(2, 15), self.rng.choice((500, 503))
        faults = [(way, way.refuse(everything, status=status)) for way in self.scene.s3.values()]
        sleep(seconds)
        for way, fault in faults:
            way.end(fault)

    def slow_requests_down(self) -> None:
        seconds = self.rng.uniform(2, 15)
        faults = [(way, way.slow(everything, seconds=0.5)) for way in self.scene.s3.values()]
        sleep(seconds)
        for way, fault in faults:
            way.end(fault)

    def flip_a_bit(self) -> None:
        """In a chunk that is not read yet, if there is one: readers find it, and a teacher makes it
        again."""
        position = {number: position for position, number in enumerate(self.plan.chunks)}
        ahead = [
            number for number in self.store.published() if position[number] > self.num_steps() + 10
        ]
        if ahead:
            number = self.rng.choice(ahead)
            key = f"casks/{self.store.key(number)}"
            data = bytearray(contents(self.bucket, key))
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            self.damaged.add(number)
            put(self.bucket, key, bytes(data))

    def kill_driver(self) -> None:
        self.run.command.kill()
        self.run = self.scene.run(self.plan)

    def num_steps(self) -> int:
        return max((row.step for row in self.run.events if isinstance(row, TrainEvent)), default=0)

    def strike(self, faults: Sequence[Callable[["Soak"], None]]) -> None:
        """The next fault: each of them once, in an order that is drawn, and then again in
        another."""
        if not self._to_come:
            self._to_come = self.rng.sample(faults, len(faults))
        fault = self._to_come.pop()
        self.struck[fault.__name__] += 1
        print(f"step {self.num_steps():5d}  {fault.__name__}", flush=True)
        fault(self)


ON_TEACHERS = (Soak.kill_teacher, Soak.lose_machine, Soak.cut_machine_off)
ON_ALL = (
    *ON_TEACHERS,
    Soak.kill_rank,
    Soak.stop_rank,
    Soak.refuse_requests,
    Soak.slow_requests_down,
    Soak.flip_a_bit,
    Soak.kill_driver,
)


def make_world(folder: Path) -> TinyWorld:
    """Work for an hour: the student is what takes the time, and teachers are at work for as long as
    it is."""
    small = TinyWorld.make(folder)
    make_model(
        folder / "student",
        vocab_size=300,
        hidden_size=128,
        intermediate_size=512,
        num_layers=6,
        num_heads=4,
        seed=2,
    )
    values = small.values | {
        "corpus": {"dataset": "stdlib", "sequence_length": 64, "heldout_sequences": 8}
    }
    return TinyWorld(folder, values)


def plan_of(
    scene: Scene, world: TinyWorld, run_dir: Path, *, bucket: str, max_steps: int | None
) -> Plan:
    """Each chunk is a batch; the learning rate stands still, so that a run is the beginning of any
    longer one."""
    student: dict[str, Any] = {
        "num_workers": 2,
        "global_batch_sequences": 32,
        "micro_batch_sequences": 8,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_steps": max_steps or 1_000_000,
        "checkpoint_every_steps": 20,
        "checkpoint_url": f"s3://{bucket}/{run_dir.name}",
        "max_failures": 1000,
        "watchdog_s": 20.0,
    }
    teacher = {"min_replicas": 1, "max_replicas": 2, "max_failures": 1000}
    store = {"url": f"s3://{bucket}/casks", "chunk_sequences": 32, "window_bytes": 1 << 20}
    return scene.plan(world, run_dir, student=student, teacher=teacher, store=store)


def soak(story: Soak, *, minutes: float, faults: Sequence[Callable[[Soak], None]]) -> list[str]:
    """Live through it; what was wrong in the end, as far as the run alone can show it."""
    story.run.until(lambda: story.num_steps() > 0)
    end = monotonic() + 60 * minutes
    while monotonic() < end:
        sleep(max(0.0, min(story.rng.uniform(0.75, 1.25) * EVERY_S, end - monotonic())))
        if story.run.command.has_ended():
            return [f"the command ended: {story.run.command.words()}"]
        if monotonic() < end:
            story.strike(faults)
    num_steps = story.num_steps()
    story.run.until(lambda: story.num_steps() > num_steps)  # after the last blow, too
    os.kill(story.run.command.pid, signal.SIGINT)
    code = story.run.command.wait(timeout_s=120)
    tell(story)
    story.scene.make_whole()
    problems = (
        []
        if code == 130
        else [f"exit code {code} of an interrupted run: {story.run.command.words()}"]
    )
    return problems + doubled(story) + untrue(story)


def untrue(story: Soak) -> list[str]:
    """What the run told of commits and chunks, and was not so in the end."""
    commits = {"student": commits_in(f"s3://{story.bucket}/{story.plan.run_dir.name}/student")}
    return violations(told_in(story.run.events), Left(commits, chunks_in(story.store)))


def undisturbed(longest: Soak, world: TinyWorld) -> LiveRun:
    """The same steps, with nothing in their way and every chunk at hand."""
    run_dir = longest.plan.run_dir.with_name("undisturbed")
    run = longest.scene.run(
        plan_of(longest.scene, world, run_dir, bucket=longest.bucket, max_steps=longest.num_steps())
    )
    assert run.command.wait(timeout_s=7200) == 0, run.command.words()
    return run


def doubled(story: Soak) -> list[str]:
    sound = {
        f"casks/{story.store.key(number)}" for number in story.store.published() - story.damaged
    }
    return [
        f"{key} was written {times} times"
        for key, times in times_written(story.bucket).items()
        if key in sound and times != 1
    ]


def differing(story: Soak, other: LiveRun) -> list[str]:
    ours, theirs = curve(story.run.events), curve(other.events)
    if [step for step, *_ in ours] != [*range(1, len(ours) + 1)]:
        return [f"{story.bucket}: steps are missing from its journal"]
    return [
        f"step {mine[0]}: {mine}, undisturbed {his}"
        for mine, his in zip(ours, theirs[: len(ours)], strict=True)
        if mine != his
    ][:5]


def tell(story: Soak) -> None:
    """What happened, how the run went on, and where the time went."""
    summary = summarise(story.run.events)
    assert summary is not None
    print(f"\nfaults: {dict(story.struck)}")
    print("\n".join(incidents(summary)))
    for each in recoveries(summary):
        print(
            f"{each.at:6.0f} s  {each.whose} {each.cause}, after {each.seconds:.1f} s and "
            f"{each.lost_steps} steps again; {each.detail[:80]}"
        )
    for whose, time in (("students", student_time(summary)), ("teachers", teacher_time(summary))):
        assert time is not None
        parts = ", ".join(f"{part} {time.share(part):.1%}" for part in PARTS)
        print(f"goodput of the {whose}: {time.goodput:.1%} ({parts})", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would name every request
    with (
        s3_server() as endpoint,
        tempfile.TemporaryDirectory() as folder,
        Scene.open(endpoint, cache=Path(folder)) as scene,
    ):
        world, rng = make_world(Path(folder)), random.Random(arguments.seed)
        problems, stories = list[str](), list[Soak]()
        for name, faults, minutes in (
            ("teachers", ON_TEACHERS, arguments.minutes / 2),
            ("all", ON_ALL, arguments.minutes),
        ):
            print(f"\n{minutes:g} minutes of faults: {name}", flush=True)
            stories.append(Soak(scene, world, Path(folder), rng, name=name))
            problems += soak(stories[-1], minutes=minutes, faults=faults)
        steady = undisturbed(max(stories, key=Soak.num_steps), world)
        for story in stories:
            problems += differing(story, steady)
    print("\n".join(problems) or "nothing was lost, done twice or different")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
