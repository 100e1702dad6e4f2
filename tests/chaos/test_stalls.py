"""Processes that stand still and end nothing: a teacher that is stopped, and a rank whose read
never returns."""

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import ray

from helpers.processes import youngest
from helpers.ranks import RankGroup
from helpers.training import train_and_tell, train_on_a_line
from helpers.world import TinyWorld
from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.placement import placement
from stillhouse.cluster.processes import Secrets
from stillhouse.pipeline import Plan
from stillhouse.pool.actor_backend import ActorBackend
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.sequences.stored import Work
from stillhouse.store import ChunkStore
from stillhouse.student.workers import watched
from stillhouse.teacher.actor import Ready, TeacherJob, spawn
from stillhouse.teacher.pool import comparison, limits_of
from stillhouse.tracking import (
    Journal,
    RunEvent,
    StallEvent,
    TeacherEvent,
    latest_train_events,
    read_journal,
)

WATCHDOG_S = 4.0
PATIENCE_S = 120.0
LOOK_EVERY_S = 0.05
NUM_CHUNKS = 4


def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + PATIENCE_S
    while not condition():
        assert monotonic() < deadline
        sleep(LOOK_EVERY_S)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def plan(tiny_world: TinyWorld, tmp_path: Path) -> Plan:
    return tiny_world.plan(
        tmp_path / "run",
        store={"url": str(tmp_path / "store")},
        teacher={"watchdog_s": WATCHDOG_S},
        student={
            "watchdog_s": WATCHDOG_S,
            "max_steps": 8,
            "checkpoint_every_steps": 2,
            "min_learning_rate": 3e-3,
        },
    )


def test_the_only_teacher_is_stopped_and_within_the_watchdogs_time_another_makes_the_same_chunks(
    plan: Plan, ray_cluster: dict[str, float], tiny_world: TinyWorld, tmp_path: Path
) -> None:
    config, store, journal = (
        plan.config,
        ChunkStore.create(plan.config.store.url, plan.recipe),
        Journal(tmp_path / "journal.jsonl"),
    )
    coordinator = Coordinator.create()
    stopped: list[psutil.Process] = []

    def item_of(number: int) -> Work:
        if not stopped:
            stopped.append(youngest("ray::_TeacherActor"))
            stopped[0].suspend()
        return plan.item(number)

    job = TeacherJob(config.teacher, plan.recipe, config.store.url, threads=1, notices="off")
    pool: Dispatcher[Work, Ready] = Dispatcher(
        ActorBackend(
            partial(
                spawn,
                job,
                where=placement(config.teacher, ray_cluster),
                secrets=Secrets(None),
                coordinator=coordinator,
            )
        ),
        limits_of(config.teacher),
        compare=comparison(plan.recipe),
        store=store,
        order=plan.chunks[:NUM_CHUNKS],
        item_of=item_of,
        window_chunks=NUM_CHUNKS,
        journal=journal,
    )
    pool.run(readers=(), coordinator=coordinator, finished=lambda: True)

    rows = read_journal(journal.path)
    (stall,) = [row for row in rows if isinstance(row, StallEvent)]
    assert (stall.role, stall.rank, stall.phase, stall.chunk) == (
        "teacher",
        0,
        "work",
        plan.chunks[0],
    )
    assert WATCHDOG_S <= stall.seconds < 10 * WATCHDOG_S
    assert [row.replica for row in rows if isinstance(row, TeacherEvent)] == [0, 1]
    until(lambda: has_ended(stopped[0]))
    undisturbed = tiny_world.plan(tmp_path / "undisturbed", store={"url": str(tmp_path / "other")})
    tiny_world.fill_store(undisturbed)
    for number in plan.chunks[:NUM_CHUNKS]:
        ours, theirs = (
            Path(each.config.store.url) / store.key(number) for each in (plan, undisturbed)
        )
        assert ours.read_bytes() == theirs.read_bytes()


@contextmanager
def held_back(path: Path) -> Iterator[None]:
    """Whoever opens the file waits until the block ends, or the system's patience does, which is 45
    s: as on a file server that is away."""
    descriptor = os.open(path, os.O_RDWR)
    # by which the system tells that somebody waits
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


def test_a_rank_whose_read_never_returns_is_named_with_its_chunk_killed_and_the_next_goes_on(
    plan: Plan, tiny_world: TinyWorld, rank_groups: dict[int, RankGroup], tmp_path: Path
) -> None:
    tiny_world.fill_store(plan)
    (job,) = plan.jobs
    undisturbed = rank_groups[1].call(
        train_and_tell, replace(job, run_dir=tmp_path / "undisturbed")
    )[0]
    chunk = plan.chunks[6]
    coordinator, journal = Coordinator.create(job.journal), Journal(job.journal)
    ranks = RankGroup.start(1, meeting=tmp_path / "meeting")
    job.run_dir.mkdir()
    where = placement(job.section, {"CPU": 4.0})
    path = Path(plan.config.store.url) / ChunkStore(job.store_url, job.recipe).key(chunk)
    with (
        held_back(path),
        watched([job], where=where, coordinator=coordinator, journal=journal),
        pytest.raises(ray.exceptions.RayActorError),
    ):
        ranks.call(train_on_a_line, job, coordinator)

    def rows() -> list[RunEvent]:
        return read_journal(job.journal)

    (stall,) = [row for row in rows() if isinstance(row, StallEvent)]
    assert (stall.role, stall.rank, stall.phase, stall.chunk) == ("student", 0, "reading", chunk)
    assert stall.seconds >= WATCHDOG_S
    assert "fetch_rows" in stall.stack
    rank_groups[1].call(train_on_a_line, job, coordinator)
    assert latest_train_events(rows(), "student")[-1].step == job.total_steps
    ours = [(row.step, row.loss, row.grad_norm) for row in latest_train_events(rows(), "student")]
    assert ours == [(row.step, row.loss, row.grad_norm) for row in undisturbed]
