"""A driver that gets a SIGTERM waits for ranks that have something to commit, and for nothing
else."""

import os
import signal
from collections.abc import Callable
from time import monotonic, sleep, time
from typing import ClassVar

import pytest

from helpers.processes import kill_one
from helpers.training import ListTracker
from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.heartbeat import Heartbeat
from stillhouse.cluster.preemption import PreemptionNotice
from stillhouse.errors import HeadGoneError, InterruptedRunError, StoreUnavailable
from stillhouse.pipeline import machines
from stillhouse.pipeline.machines import Machines, watched_machines
from stillhouse.tracking import NoticeEvent, RunEvent

pytestmark = pytest.mark.usefixtures("ray_cluster")

PATIENCE_S = 60.0


def test_a_driver_that_is_told_to_go_waits_for_its_ranks_and_not_for_machines_that_may_never_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machines, "_SILENT_S", 3.0)
    coordinator, journal, told = Coordinator.create(), ListTracker(), list[PreemptionNotice]()
    found = Machines(coordinator, journal, lambda _now: told[0] if told else None)
    found.start()
    try:
        found.require_driver()
        told.append(PreemptionNotice("sigterm", time() + 30, "SIGTERM"))
        with pytest.raises(InterruptedRunError):
            found.require_driver()
        deadline = monotonic() + PATIENCE_S
        while not any(isinstance(event, NoticeEvent) for event in journal.rows):
            assert monotonic() < deadline
            sleep(0.05)
        until = monotonic() + 4.0
        while monotonic() < until:
            coordinator.heartbeat(
                Heartbeat("student", 0, 1, "here", pid=1, step=3, phase="commit", phase_s=0.1)
            )
            assert not found.no_rank_commits()
            sleep(0.05)
        coordinator.forget("student")  # it has committed and left
        assert found.no_rank_commits()
    finally:
        found.stop()


def test_what_the_coordinators_process_held_when_it_died_is_told_to_its_successor() -> None:
    coordinator, told = Coordinator.create(), list[PreemptionNotice]()
    found = Machines(coordinator, ListTracker(), lambda _now: told[0] if told else None)
    heartbeat = Heartbeat("student", 0, 1, "doomed", pid=1, step=3, phase="step", phase_s=0.1)
    asked: list[str] = []

    def is_asked(cause: str) -> bool:
        stop_request = coordinator.heartbeat(heartbeat)
        asked.append("" if stop_request is None else stop_request.cause)
        return asked[-1] == cause and set(coordinator.notices()) == {"doomed"}

    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = monotonic() + PATIENCE_S
        while not condition():
            assert monotonic() < deadline, asked
            sleep(0.05)

    found.start()
    try:
        coordinator.announce(
            "doomed", PreemptionNotice("ray", time() + 300.0, "the node is being drained")
        )
        wait_until(lambda: "doomed" in found.known)
        kill_one("ray::Coordinator")
        wait_until(lambda: is_asked("notice"))
        told.append(PreemptionNotice("sigterm", time() + 300, "SIGTERM"))
        wait_until(lambda: is_asked("stop"))
        kill_one("ray::Coordinator")
        wait_until(lambda: is_asked("stop"))
    finally:
        found.stop()


class FailsOnce(Coordinator):
    """A coordinator of which the first question for notices fails, as where Ray cannot reach it for
    a moment."""

    failures: ClassVar[list[HeadGoneError]] = []

    def notices(self) -> dict[str, PreemptionNotice]:
        if self.failures:
            raise self.failures.pop()
        return super().notices()


def test_a_question_that_fails_once_is_asked_again() -> None:
    coordinator = FailsOnce(Coordinator.create()._actor)
    found = Machines(coordinator, ListTracker(), lambda _now: None)
    coordinator.announce(
        "doomed", PreemptionNotice("ray", time() + 300.0, "the node is being drained")
    )
    FailsOnce.failures.append(HeadGoneError("not now"))
    found.start()
    try:
        deadline = monotonic() + PATIENCE_S
        while "doomed" not in found.known:
            assert monotonic() < deadline
            sleep(0.05)
    finally:
        found.stop()
    assert FailsOnce.failures == []


class FullJournal(ListTracker):
    """A journal whose disk is full for the next rows."""

    left: ClassVar[list[StoreUnavailable]] = []

    def record(self, event: RunEvent) -> None:
        if self.left:
            raise self.left.pop()
        super().record(event)


def test_an_announced_end_is_passed_on_while_the_journals_disk_is_full_and_written_later() -> None:
    coordinator, journal = Coordinator.create(), FullJournal()
    FullJournal.left[:] = [StoreUnavailable("cannot append: No space left on device")]
    found = Machines(
        coordinator, journal, lambda _now: PreemptionNotice("sigterm", time() + 300.0, "SIGTERM")
    )
    heartbeat = Heartbeat("student", 0, 1, "here", pid=1, step=3, phase="step", phase_s=0.1)
    found.start()
    try:
        deadline = monotonic() + PATIENCE_S
        while (stop_request := coordinator.heartbeat(heartbeat)) is None:
            assert monotonic() < deadline
            sleep(0.05)
        while not journal.rows:
            assert monotonic() < deadline
            sleep(0.05)
    finally:
        found.stop()
    assert stop_request.cause == "stop"
    assert [
        (event.source, event.node) for event in journal.rows if isinstance(event, NoticeEvent)
    ] == [("sigterm", "driver")]


def test_what_other_machines_have_to_say_is_said_on_the_drivers_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    coordinator, said = Coordinator.create(), ""
    found = Machines(coordinator, ListTracker(), lambda _now: None)
    coordinator.say("student, rank 0 has waited for 5 s: the disk is full")
    found.start()
    try:
        deadline = monotonic() + PATIENCE_S
        while not said:
            assert monotonic() < deadline
            said += capsys.readouterr().err
            sleep(0.05)
    finally:
        found.stop()
    assert said == "student, rank 0 has waited for 5 s: the disk is full\n"


def test_a_driver_that_was_told_to_go_waits_for_room_until_its_time_is_over() -> None:
    coordinator = Coordinator.create()

    def waits(*notices: PreemptionNotice) -> None:
        Machines(coordinator, ListTracker(), lambda _now: next(iter(notices), None)).pause(0.0)

    waits()
    waits(PreemptionNotice("sigterm", time() + 300.0, "SIGTERM"))
    with pytest.raises(InterruptedRunError):
        waits(PreemptionNotice("sigterm", time() - 1.0, "SIGTERM"))


def test_a_driver_whose_head_ended_by_the_same_sigterm_was_told_to_go() -> None:
    def lose_the_head(*, told_to_go: bool) -> None:
        with watched_machines(Coordinator.create(), ListTracker(), grace_s=30.0):
            if told_to_go:
                os.kill(os.getpid(), signal.SIGTERM)
            raise HeadGoneError

    with pytest.raises(HeadGoneError):
        lose_the_head(told_to_go=False)
    with pytest.raises(InterruptedRunError):
        lose_the_head(told_to_go=True)
