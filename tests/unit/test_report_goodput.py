"""Where the time went, on made-up journals with a known answer: every second is in one part, and
the parts add up."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from helpers.journals import START as RUN_START
from stillhouse.report import write_report
from stillhouse.report.goodput import (
    PARTS,
    Part,
    Recovery,
    TimeSpent,
    incidents,
    recoveries,
    student_time,
    teacher_time,
)
from stillhouse.report.summary import Summary, summarise
from stillhouse.tracking import (
    CheckpointEvent,
    ChunkEvent,
    DelayEvent,
    EarlyStopEvent,
    EndEvent,
    HeldoutEvent,
    Journal,
    NoticeEvent,
    OutageEvent,
    PoolEvent,
    RecoveryEvent,
    RepairEvent,
    Role,
    RunEvent,
    SetAsideEvent,
    StallEvent,
    StartEvent,
    TeacherEvent,
    TrainEvent,
)

START = replace(
    RUN_START,
    command="stillhouse run x.toml",
    versions={},
    teacher="acme/teacher",
    student="acme/student",
    vocab_size=1000,
    k=8,
    num_teachers=2,
    total_steps=4,
    control=False,
)


def summary_of(*rows: RunEvent) -> Summary:
    summary = summarise(list(rows))
    assert summary is not None
    return summary


def step(
    number: int, at: float, *, seconds: float = 4.0, waited: float = 1.0, role: Role = "student"
) -> TrainEvent:
    return TrainEvent(
        role, number, 2.0, 1.5, 3.0, 0.7, 1e-4, 200, seconds, waited, 50.0, time=1000.0 + at
    )


def chunk(
    number: int, at: float, *, seconds: float = 5.0, replica: int = 0, duplicate: bool = False
) -> ChunkEvent:
    return ChunkEvent(
        number, 250, 44_000, seconds, replica, 0.97, 3e-6, 4e-4, duplicate, time=1000.0 + at
    )


def pool(published: int, at: float, waited: float = 0.0, **more: int) -> PoolEvent:
    return PoolEvent(published, 4, 0, 4, 50.0, waited, 0, time=1000.0 + at, **more)


def teacher(replica: int, at: float, seconds: float = 3.0) -> TeacherEvent:
    return TeacherEvent(replica, seconds, "cpu", "reference", time=1000.0 + at)


def saved(
    number: int, at: float, *, seconds: float, blocking: float, role: Role = "student"
) -> CheckpointEvent:
    return CheckpointEvent(role, number, seconds, 1000, blocking, time=1000.0 + at)


def end(at: float, outcome: Literal["done", "interrupted", "failed"] = "done") -> EndEvent:
    return EndEvent(outcome, at, "", time=1000.0 + at)


def again(attempt: int, at: float) -> StartEvent:
    return replace(START, attempt=attempt, time=1000.0 + at)


def spent(found: TimeSpent | None) -> dict[Part, float]:
    """The parts that are not empty."""
    assert found is not None
    assert set(found.seconds) == set(PARTS)
    assert all(seconds >= -1e-9 for seconds in found.seconds.values())
    return {part: seconds for part, seconds in found.seconds.items() if seconds > 1e-9}


def test_an_undisturbed_student_starts_works_waits_saves_and_is_done() -> None:
    rows = [
        START,
        step(1, 14.0),  # ranks were there after 10 s
        step(2, 18.0),
        saved(2, 25.0, seconds=7.0, blocking=0.5),  # 18.0 to 18.5, the rest beside the next step
        step(3, 22.5),
        step(4, 27.0, waited=0.0),  # half a second between two steps
        saved(4, 30.0, seconds=3.0, blocking=0.5),  # the last one is waited for
        end(40.0),
    ]
    found = student_time(summary_of(*sorted(rows, key=lambda row: row.time)))
    assert spent(found) == pytest.approx(
        {
            "useful": 13.0,
            "waiting": 3.0,
            "checkpointing": 3.5,
            "starting": 10.0,
            "other": 0.5,
            "released": 10.0,
        }
    )
    assert found is not None
    assert found.total_s == pytest.approx(40.0)
    assert found.goodput == pytest.approx(13.0 / 30.0)


RECOVERED = [
    START,
    step(1, 10.0),
    step(2, 14.0),
    step(3, 18.0),
    step(
        2, 36.0
    ),  # the group was lost at 18, had committed step 1, and took step 2 again from 32 to 36
    RecoveryEvent("student", "died", "rank 1 was killed", 18.0, 2, 1, 2, time=1036.0),
    step(3, 40.0),
    step(4, 44.0),
    end(44.0),
]


def test_steps_that_were_taken_again_are_redone_and_the_time_between_is_restarting() -> None:
    summary = summary_of(*RECOVERED)
    assert spent(student_time(summary)) == pytest.approx(
        {"starting": 6.0, "useful": 3 * 4, "waiting": 4.0, "redone": 8.0, "restarting": 14.0}
    )
    assert recoveries(summary) == [Recovery(36.0, "student", "died", 18.0, 2, "rank 1 was killed")]


def test_a_notice_that_cost_no_step_is_a_recovery_too() -> None:
    rows = [
        START,
        step(1, 10.0),
        step(2, 14.0),
        step(3, 30.0),
        RecoveryEvent(
            "student", "notice", "spot instance-action terminate", 16.0, 1, 2, 0, time=1030.0
        ),
        end(30.0),
    ]
    summary = summary_of(*rows)
    assert spent(student_time(summary)) == pytest.approx(
        {"starting": 6.0, "useful": 9.0, "waiting": 3.0, "restarting": 12.0}
    )
    assert [each.lost_steps for each in recoveries(summary)] == [0]


def test_a_killed_run_that_goes_on_has_restarted_and_the_time_between_is_nobodys() -> None:
    rows = [
        START,
        step(1, 10.0),
        step(2, 14.0),
        step(3, 18.0),
        again(2, 500.0),
        step(3, 512.0),  # committed up to step 2; ranks were there after 8 s
        step(4, 516.0),
        end(520.0),
    ]
    summary = summary_of(*rows)
    found = student_time(summary)
    assert spent(found) == pytest.approx(
        {
            "starting": 6.0,
            "useful": 12.0,
            "waiting": 4.0,
            "redone": 4.0,
            "restarting": 8.0,
            "released": 4.0,
        }
    )
    assert found is not None
    assert found.total_s == pytest.approx(summary.run_s)
    assert recoveries(summary) == [Recovery(30.0, "run", "killed", 12.0, 1, "attempt 2 goes on")]


def test_a_run_that_was_interrupted_before_its_first_step_says_so_when_it_goes_on() -> None:
    rows = [START, end(5.0, "interrupted"), again(2, 100.0), step(1, 110.0), end(110.0, "failed")]
    summary = summary_of(*rows)
    assert spent(student_time(summary)) == pytest.approx(
        {"starting": 5.0, "restarting": 6.0, "useful": 3.0, "waiting": 1.0}
    )
    assert recoveries(summary) == [
        Recovery(15.0, "run", "interrupted", 10.0, 0, "attempt 2 goes on")
    ]


def test_the_control_starts_anew_and_its_work_is_useful() -> None:
    rows = [
        START,
        *(step(n, 6.0 + 4.0 * n) for n in range(1, 5)),
        saved(4, 24.0, seconds=2.0, blocking=0.1),
    ]
    rows += [step(1, 32.0, role="control", waited=0.0), end(32.0)]
    assert spent(student_time(summary_of(*rows))) == pytest.approx(
        {"starting": 6.0 + 4.0, "useful": 16.0, "waiting": 4.0, "checkpointing": 2.0}
    )


def scored(number: int, at: float, *, seconds: float, role: Role = "student") -> HeldoutEvent:
    return HeldoutEvent(role, number, 400, 3.0, 0.5, 0.6, 0.1, 0.7, seconds, time=1000.0 + at)


def test_the_time_of_scoring_held_out_text_is_named_wherever_it_was_spent() -> None:
    rows = [
        START,
        scored(0, 9.0, seconds=2.0),  # before the first step, after ranks were there
        step(1, 13.0),
        step(2, 17.0),
        scored(2, 19.0, seconds=2.0),
        saved(2, 25.0, seconds=6.0, blocking=0.5),  # 19.0 to 19.5
        step(3, 24.0),  # and half a second of nothing
        step(4, 28.0),
        scored(4, 31.0, seconds=3.0),
        saved(4, 33.0, seconds=2.0, blocking=0.5),
        scored(0, 37.0, seconds=1.0, role="control"),
        step(1, 41.0, role="control", waited=0.0),
        scored(1, 42.0, seconds=0.5, role="control"),  # the group was lost here, and came back
        scored(0, 46.0, seconds=1.0, role="control"),
        step(1, 50.0, role="control", waited=0.0),
        end(50.0),
    ]
    assert spent(student_time(summary_of(*sorted(rows, key=lambda row: row.time)))) == (
        pytest.approx(
            {
                "starting": 7.0 + 3.0,
                "scoring": 2.0 + 2.0 + 3.0 + 1.0 + 0.5 + 1.0,
                "useful": 4 * 3.0 + 4.0,
                "waiting": 4.0,
                "checkpointing": 0.5 + 2.0,
                "other": 0.5,
                "redone": 4.0,
                "restarting": 50.0 - 41.0 - 0.5 - 1.0 - 4.0,
            }
        )
    )


def test_behind_an_early_stop_the_students_processors_are_given_back() -> None:
    stop = EarlyStopEvent("student", 2, 1, 0.5, time=1020.0)
    rows = [START, step(1, 14.0), step(2, 18.0), saved(2, 20.0, seconds=2.0, blocking=0.5), stop]
    assert spent(student_time(summary_of(*rows, end(30.0)))) == pytest.approx(
        {"starting": 10.0, "useful": 6.0, "waiting": 2.0, "checkpointing": 2.0, "released": 10.0}
    )


def test_undisturbed_teachers_start_work_wait_for_the_window_and_are_released() -> None:
    rows = [
        START,
        teacher(0, 10.0),
        teacher(1, 12.0),
        chunk(0, 15.0, replica=0),
        chunk(1, 17.0, replica=1),
        pool(2, 20.0),
        pool(2, 30.0, waited=8.0),  # both stood still for 8 s of these ten
        chunk(2, 35.0, replica=0),
        chunk(3, 40.0, replica=1, seconds=10.0),
        pool(4, 40.0, waited=8.0),
        end(60.0),
    ]
    found = teacher_time(summary_of(*rows))
    assert spent(found) == pytest.approx(
        {
            "starting": 10.0 + 12.0,
            "useful": 5.0 + 5.0 + 5.0 + 10.0,
            "waiting": 2 * 8.0,
            "other": 2 * 60.0 - 22.0 - 25.0 - 16.0 - 40.0,
            "released": 2 * 20.0,
        }
    )
    assert found is not None
    assert found.total_s == pytest.approx(2 * 60.0)
    assert found.goodput == pytest.approx(25.0 / 80.0)


def test_a_chunk_made_twice_was_useful_once_and_a_replacement_is_a_restart() -> None:
    rows = [
        START,
        teacher(0, 10.0),
        teacher(1, 10.0),
        chunk(0, 15.0, replica=0),
        chunk(0, 16.0, replica=1, seconds=6.0, duplicate=True),
        teacher(2, 24.0, seconds=4.0),
        chunk(1, 30.0, replica=2),
        RepairEvent(1, time=1031.0),
        chunk(1, 40.0, replica=0),
        pool(4, 40.0, losses=1),
        end(40.0),
    ]
    summary = summary_of(*rows)
    assert spent(teacher_time(summary)) == pytest.approx(
        {
            "starting": 20.0,
            "useful": 10.0,
            "redone": 6.0 + 5.0,
            "restarting": 4.0,
            "other": 80.0 - 45.0,
        }
    )
    assert incidents(summary) == [
        "1 lease lost with a teacher",
        "1 chunk made twice",
        "1 damaged chunk made anew",
    ]


def test_every_start_of_a_later_attempt_is_a_restart_and_a_full_store_releases_at_once() -> None:
    rows = [
        START,
        teacher(0, 4.0),
        teacher(1, 4.0),
        chunk(0, 9.0),
        again(2, 100.0),
        teacher(0, 106.0),
        teacher(1, 106.0),
    ]
    rows += [
        chunk(1, 111.0),
        pool(4, 111.0),
        end(111.0),
        again(3, 200.0),
        pool(4, 200.0),
        end(230.0),
    ]
    assert spent(teacher_time(summary_of(*rows))) == pytest.approx(
        {"starting": 8.0, "restarting": 12.0, "useful": 10.0, "other": 10.0, "released": 60.0}
    )


def test_more_teachers_at_once_than_were_asked_for_do_not_make_more_time() -> None:
    rows = [START, *(chunk(n, 10.0, replica=n, seconds=10.0) for n in range(3)), end(10.0)]
    assert spent(teacher_time(summary_of(*rows))) == pytest.approx({"useful": 20.0})


@pytest.mark.parametrize("rows", [[], [end(5.0, "failed")], [pool(4, 1.0), end(2.0)]])
def test_nobody_at_work_spent_no_time(rows: Sequence[RunEvent]) -> None:
    summary = summary_of(START, *rows)
    assert student_time(summary) is None
    assert teacher_time(summary) is None
    assert recoveries(summary) == []
    assert incidents(summary) == []


def test_the_parts_of_any_course_add_up_to_the_run() -> None:
    """Rows in any order and of any length: clocks of other machines may be behind."""
    rows = [
        START,
        teacher(0, 3.0),
        step(1, 9.0, seconds=20.0),
        chunk(0, 5.0, seconds=50.0),
        saved(1, 7.0, seconds=30.0, blocking=30.0),
    ]
    rows += [
        step(2, 8.0),
        again(2, 30.0),
        step(2, 31.0, seconds=9.0),
        step(2, 31.0),
        pool(1, 40.0, waited=99.0),
        chunk(0, 41.0),
    ]
    summary = summary_of(*rows)
    students, teachers = student_time(summary), teacher_time(summary)
    assert students is not None
    assert teachers is not None
    spent(students)
    spent(teachers)
    assert students.total_s == pytest.approx(summary.run_s)
    assert teachers.total_s == pytest.approx(2 * summary.run_s)


def test_the_page_tells_recoveries_with_their_causes_and_only_if_there_were_any(
    tmp_path: Path,
) -> None:
    more: list[RunEvent] = [
        NoticeEvent("aws", "n1", 110.0, "spot", time=1041.0),
        StallEvent("student", 1, 3, "step", 30.0, "", time=1042.0),
        StallEvent("teacher", 0, 0, "work", 301.0, "", 7, time=1042.5),
        SetAsideEvent(3, [1, 2], "IndexError", time=1043.0),
        DelayEvent("student", 2, 0, "the store is too busy", time=1044.0),
        DelayEvent("student", 2, 1, "the store is too busy", time=1044.5),
        OutageEvent("student, rank 1", 61.0, "the store is too busy", time=1044.6),
    ]
    pages = {}
    for name, rows in {
        "calm": [START, step(1, 10.0), end(10.0)],
        "stormy": [*RECOVERED[:-1], *more, RECOVERED[-1]],
    }.items():
        (tmp_path / name).mkdir()
        for row in rows:
            Journal(tmp_path / name / "journal.jsonl").record(row)
        pages[name] = write_report(tmp_path / name).read_text(encoding="utf-8")
    assert "Where the time went" in pages["calm"]
    assert '<table class="recoveries">' not in pages["calm"]
    for words in (
        "<td>student</td><td>died</td><td>18.0</td><td>2</td><td>rank 1 was killed</td>",
        "1 notice of a machine",
        "1 stalled rank found by the watchdog",
        "1 silent teacher killed and replaced",
        "2 sequences set",
        "1 checkpoint that the store did not take at once",
        "1 long wait for a store that was unavailable",
    ):
        assert words in pages["stormy"]
