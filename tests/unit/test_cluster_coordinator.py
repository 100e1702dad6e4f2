"""The coordinator: what each caller is answered, and which of its state outlives its process."""

import logging
import pickle
import secrets
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import time
from types import SimpleNamespace

import pytest

from helpers.damage import fill, small_disk
from helpers.processes import kill_one
from stillhouse.cluster.coordinator import Coordinator, News
from stillhouse.cluster.coordinator_actor import CoordinatorActor
from stillhouse.cluster.heartbeat import Heartbeat, PreviousAttempt, StopRequest
from stillhouse.cluster.preemption import PreemptionNotice
from stillhouse.errors import StoreError, StoreUnavailable, StudentError
from stillhouse.redaction import know
from stillhouse.tracking import DamagedEvent, OutageEvent, read_journal
from stillhouse.tracking.log import driver_log, process_log

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def coordinator() -> Coordinator:
    return Coordinator.create()


def heartbeat(group: str, rank: int = 0, *, node: str = "here", step: int = 3) -> Heartbeat:
    return Heartbeat(group, rank, 2, node, pid=1, step=step, phase="step", phase_s=0.1)


def test_the_coordinator_keeps_cursors_and_hands_out_each_report_once(
    coordinator: Coordinator,
) -> None:
    assert coordinator.read() == News({}, frozenset(), {})
    for cursor in (1, 2, 5, 4):  # a student that resumes goes back
        coordinator.move_cursor("student", cursor)
    coordinator.move_cursor("control", 7)
    for number in (3, 3, 9):
        pickle.loads(pickle.dumps(coordinator)).report_bad_chunk(number)
    assert coordinator.read() == News({"student": 4, "control": 7}, frozenset({3, 9}), {})
    assert coordinator.read() == News({"student": 4, "control": 7}, frozenset(), {})


def test_each_heartbeat_of_a_teacher_is_handed_out_once(coordinator: Coordinator) -> None:
    for number in (3, 3, 9):
        coordinator.heartbeat_of_worker(number)
    assert coordinator.read().heard_teachers == {3, 9}
    assert coordinator.read().heard_teachers == frozenset()


def test_what_is_asked_again_because_its_answer_was_lost_is_done_once(tmp_path: Path) -> None:
    coordinator = CoordinatorActor(tmp_path / "journal.jsonl")
    for _ in range(2):
        coordinator.once("a row", "record", DamagedEvent("student", "step-00000005.json", time=1.0))
    assert len(read_journal(tmp_path / "journal.jsonl")) == 1
    coordinator.report_bad_chunk(3)
    assert [coordinator.once("news", "read")[1] for _ in range(2)] == [{3}, {3}]
    assert coordinator.once("other news", "read")[1] == frozenset()
    assert [coordinator.once("a life", "begin", "student", 0) for _ in range(2)] == [None, None]
    assert isinstance(coordinator.once("the next", "begin", "student", 0), PreviousAttempt)


def test_a_notice_stops_the_groups_on_its_machine_and_no_other(coordinator: Coordinator) -> None:
    coordinator.announce("doomed", PreemptionNotice("aws", time() + 100.0, "terminate"))
    # the first to say so is believed
    coordinator.announce("doomed", PreemptionNotice("ray", time() + 200.0, "drain"))
    assert [(notice.source, notice.detail) for notice in coordinator.notices().values()] == [
        ("aws", "terminate")
    ]
    assert coordinator.heartbeat(heartbeat("elsewhere")) is None
    assert coordinator.heartbeat(heartbeat("held")) is None
    for rank, node in ((1, "doomed"), (0, "here")):
        found = coordinator.heartbeat(heartbeat("held", rank, node=node))
        assert found is not None
        assert (found.cause, found.detail) == ("notice", "aws: terminate")
        assert found.seconds_left == pytest.approx(100.0, abs=30)


@pytest.mark.parametrize("ahead_s", [-1e6, 3600.0])
def test_a_deadline_is_as_far_away_on_a_machine_whose_clock_is_set_differently(
    coordinator: Coordinator, ahead_s: float
) -> None:
    theirs = replace(coordinator, wall=lambda: time() + ahead_s)
    coordinator.announce(f"node {ahead_s}", PreemptionNotice("sigterm", time() + 100.0, "SIGTERM"))
    here, there = (
        each.notices()[f"node {ahead_s}"].deadline - each.wall() for each in (coordinator, theirs)
    )
    assert here == pytest.approx(100.0, abs=30)
    assert there == pytest.approx(here, abs=30)


def test_heartbeats_and_deadlines_age_by_the_coordinators_own_clock() -> None:
    now = [1000.0]
    coordinator = CoordinatorActor(None, clock=lambda: now[0])
    coordinator.heartbeat(heartbeat("group"))
    coordinator.stepped("group", 4)
    coordinator.begin("group", 0)
    coordinator.heartbeat(heartbeat("group"))
    coordinator.request_stop("group", StopRequest("stop", 60.0, "SIGTERM"))
    now[0] += 45.0
    assert [heard.ago_s for heard in coordinator.heard("group")] == [45.0]
    assert coordinator.heartbeat(heartbeat("group")) == StopRequest("stop", 15.0, "SIGTERM")
    past = coordinator.begin("group", 0)
    assert past is not None
    assert past.seconds_ago == 45.0


STEPPED = """
import time
real, step_s = time.time, 0.0
time.time = lambda: real() + step_s
from stillhouse.cluster.coordinator_actor import CoordinatorActor
from stillhouse.cluster.heartbeat import Heartbeat
from stillhouse.student.watchdog import stalled
coordinator = CoordinatorActor(None)
coordinator.heartbeat(Heartbeat("student", 0, 1, "here", pid=1, step=3, phase="step", phase_s=0.1))
for step_s in (301.0, -301.0):
    print(stalled(coordinator.heard("student"), patience_s=300.0))
"""


def test_a_step_of_the_wall_clock_makes_no_rank_look_silent() -> None:
    assert subprocess.run(
        [sys.executable, "-c", STEPPED], capture_output=True, text=True, check=True
    ).stdout.split() == ["None", "None"]


def test_a_group_is_told_how_its_last_life_ended(coordinator: Coordinator) -> None:
    assert coordinator.begin("group", committed_step=0) is None
    coordinator.stepped("group", 7)
    found = coordinator.begin("group", committed_step=4)
    assert isinstance(found, PreviousAttempt)
    assert (found.cause, found.last_step, found.num_failures) == ("died", 7, 1)
    assert 0.0 <= found.seconds_ago < 60.0
    coordinator.explain("group", "stalled", "rank 1 was silent")
    coordinator.explain("group", "died", "the connection to rank 1 was lost")  # because of it
    found = coordinator.begin("group", committed_step=4)
    assert found is not None
    assert (found.cause, found.detail, found.num_failures) == ("stalled", "rank 1 was silent", 2)


class Repeating:
    """An actor to which each message comes three times, as Ray sends one again whose
    acknowledgement was lost."""

    def __init__(self, actor: CoordinatorActor) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> SimpleNamespace:
        def remote(*arguments: object) -> None:
            for _ in range(3):
                getattr(self._actor, method)(*arguments)

        return SimpleNamespace(remote=remote)


def test_what_is_mentioned_or_said_and_sent_again_counts_once(tmp_path: Path) -> None:
    actor = CoordinatorActor(tmp_path / "journal.jsonl")
    coordinator = Coordinator(Repeating(actor))
    for number in range(2):
        coordinator.mention(OutageEvent("teacher", number, "busy"))
        coordinator.say(f"message {number}")
    events = read_journal(tmp_path / "journal.jsonl")
    assert [event.seconds for event in events if isinstance(event, OutageEvent)] == [0, 1]
    assert actor.take_messages() == ["message 0", "message 1"]


def test_a_hang_that_is_found_late_still_explains_the_peers_that_failed_before(
    coordinator: Coordinator,
) -> None:
    coordinator.begin("late", committed_step=0)
    coordinator.explain("late", "died", "timed out waiting for rank 1")
    coordinator.explain("late", "stalled", "rank 1 was silent")
    found = coordinator.begin("late", committed_step=0)
    assert found is not None
    assert (found.cause, found.detail) == ("stalled", "rank 1 was silent")
    coordinator.explain("late", "notice", "aws: terminate")  # on which all left
    coordinator.explain("late", "stalled", "rank 1 was silent")
    found = coordinator.begin("late", committed_step=0)
    assert found is not None
    assert found.cause == "notice"


def test_only_failures_without_a_new_commit_add_up(coordinator: Coordinator) -> None:
    def failures_after(*, committed_step: int) -> int:
        past = coordinator.begin("unlucky", committed_step=committed_step)
        return -1 if past is None else past.num_failures

    assert [failures_after(committed_step=step) for step in (0, 0, 0, 5, 5)] == [-1, 1, 2, 1, 2]
    coordinator.explain("unlucky", "notice", "aws: terminate")
    assert failures_after(committed_step=5) == 0


def test_a_stop_request_for_good_holds_for_the_next_attempt_and_no_other_does(
    coordinator: Coordinator,
) -> None:
    def asked() -> str | None:
        found = coordinator.heartbeat(heartbeat("called"))
        return None if found is None else found.cause

    coordinator.begin("called", committed_step=0)
    coordinator.request_stop("called", StopRequest("grown", 2_000.0, "room"))
    assert asked() == "grown"
    coordinator.begin("called", committed_step=3)
    assert asked() is None
    coordinator.request_stop("called", StopRequest("stop", 2_000.0, "SIGTERM"))
    coordinator.begin("called", committed_step=3)
    assert asked() == "stop"


def test_signs_of_life_are_kept_until_a_rank_is_forgotten_or_its_group_begins_anew(
    coordinator: Coordinator,
) -> None:
    for rank in (0, 1):
        coordinator.heartbeat(heartbeat("alive", rank))
    heard = coordinator.heard("alive")
    assert [each.heartbeat.rank for each in heard] == [0, 1]
    assert all(0.0 <= each.ago_s < 60.0 for each in heard)
    coordinator.forget("alive", rank=0)
    assert [each.heartbeat.rank for each in coordinator.heard("alive")] == [1]
    coordinator.begin("alive", committed_step=0)
    assert coordinator.heard("alive") == coordinator.heard("never begun") == []


def test_the_first_verdict_stands(coordinator: Coordinator) -> None:
    assert coordinator.fatal_error() is None
    coordinator.give_up(StudentError("the loss is nan"))
    coordinator.give_up(StudentError("a peer was lost"))
    assert str(coordinator.fatal_error()) == "the loss is nan"


def test_the_coordinator_outlives_its_process(coordinator: Coordinator) -> None:
    coordinator.move_cursor("student", 5)
    assert coordinator.read().cursors["student"] == 5
    kill_one("ray::Coordinator")
    coordinator.move_cursor("student", 6)
    # what it held is lost; what is told it again is not
    assert coordinator.read().cursors.get("student", 6) == 6
    coordinator.move_cursor("student", 7)
    coordinator.report_bad_chunk(1)
    assert coordinator.read() == News({"student": 7}, frozenset({1}), {})


def test_a_row_is_on_disk_when_it_is_recorded_and_a_disk_that_refuses_is_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.jsonl"
    Coordinator.create(path).record(DamagedEvent("student", "a flipped bit"))
    (event,) = read_journal(path)
    assert isinstance(event, DamagedEvent)
    assert event.problem == "a flipped bit"
    assert event.time == pytest.approx(time(), abs=60)
    with pytest.raises(StoreError, match=r"cannot append to .*absent"):
        Coordinator.create(tmp_path / "absent" / "journal.jsonl").record(
            DamagedEvent("student", "another")
        )


def test_a_full_disk_fails_a_record_at_once_and_keeps_no_other_caller_waiting(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", num_bytes=64 << 10) as disk:
        coordinator = Coordinator.create(disk / "journal.jsonl")
        fill(disk / "ballast")
        with pytest.raises(StoreUnavailable, match="No space left"):
            coordinator.record(DamagedEvent("student", "a checkpoint"))
        assert coordinator.heartbeat(heartbeat("meanwhile")) is None
        (disk / "ballast").unlink()
        coordinator.record(DamagedEvent("student", "a checkpoint"))
        assert [
            event.problem
            for event in read_journal(disk / "journal.jsonl")
            if isinstance(event, DamagedEvent)
        ] == ["a checkpoint"]


def test_a_mentioned_row_is_written_where_it_can_be_and_is_no_error_where_it_cannot(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    path = tmp_path / "later" / "journal.jsonl"
    writing = Coordinator.create(path)
    for seconds in (61.0, 62.0):
        for each in (coordinator, writing):  # `coordinator` has no journal
            each.mention(OutageEvent("teacher on n1", seconds, "too busy"))
            assert each.heard("no group") == []  # calls are served in order: it was mentioned
        path.parent.mkdir(exist_ok=True)
    (event,) = read_journal(path)
    assert isinstance(event, OutageEvent)
    assert (event.who, event.seconds, event.why) == ("teacher on n1", 62.0, "too busy")


def test_a_secret_that_only_the_sender_knows_does_not_leave_it(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    secret = secrets.token_hex(16)  # of no variable, so the coordinator's process does not know it
    know([secret])
    Coordinator.create(tmp_path / "journal.jsonl").record(
        DamagedEvent("student", f"401 for {secret}")
    )
    assert [
        event.problem
        for event in read_journal(tmp_path / "journal.jsonl")
        if isinstance(event, DamagedEvent)
    ] == ["401 for (redacted)"]
    coordinator.begin("told", committed_step=0)
    coordinator.explain("told", "died", f"401 for {secret}")
    past = coordinator.begin("told", committed_step=0)
    assert past is not None
    assert past.detail == "401 for (redacted)"


def test_a_warning_of_a_process_without_the_run_directory_reaches_the_driver_by_the_coordinator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with driver_log(tmp_path):
        coordinator = Coordinator.create()
        assert coordinator.log is not None
        handed = pickle.loads(
            pickle.dumps(replace(coordinator.log, driver="driver-of-another-machine.log"))
        )
        with process_log("teacher-9", handed):
            logging.getLogger("stillhouse.tests").warning("hot")
        assert coordinator.heard("no group") == []  # calls are served in order, so it has arrived
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if " WARNING coordinator-" in line
    ]
    assert " WARNING teacher-9-" in line
    assert line.endswith("stillhouse.tests: hot")
    assert not list((tmp_path / "logs").glob("teacher-9-*"))
