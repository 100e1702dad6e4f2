"""What was trained, read off the journal: each step's schedule in its last attempt, and which
settings had no effect."""

from dataclasses import replace

import pytest

from stillhouse.tracking import (
    Role,
    RunEvent,
    StartEvent,
    TrainEvent,
    nothing_left,
    stretches,
    words_of,
)

OLD = StartEvent(
    1,
    "stillhouse run x.toml",
    {},
    "t",
    "s",
    "0f" * 32,
    8,
    32,
    64,
    2000,
    99,
    0,
    300,
    8,
    2,
    2,
    2,
    total_steps=10,
    control=False,
)
START = replace(OLD, learning_rate=3e-3, min_learning_rate=1e-4, warmup_steps=2)


def steps(
    numbers: range, *, role: Role = "student", learning_rate: float = 3e-3, world_size: int = 2
) -> list[RunEvent]:
    return [
        TrainEvent(
            role,
            number,
            2.0,
            1.5,
            None,
            0.7,
            learning_rate,
            200,
            4.0,
            1.0,
            50.0,
            world_size=world_size,
        )
        for number in numbers
    ]


def asked(earlier: list[RunEvent], start: StartEvent, **committed: int) -> str:
    return nothing_left(earlier, replace(start, committed_steps=committed))


def test_steps_that_were_lost_and_taken_again_count_for_their_last_attempt() -> None:
    again = replace(START, attempt=2, learning_rate=1e-3)
    events = [START, *steps(range(1, 9)), again, *steps(range(5, 7), world_size=1)]
    first, second = stretches(events, "student")
    assert (first.first_step, first.last_step, first.world_sizes) == (1, 4, (2,))
    # 7 and 8 led to other weights
    assert (second.first_step, second.last_step, second.world_sizes) == (
        5,
        6,
        (1,),
    )
    assert first.schedule is not None
    assert second.schedule == replace(first.schedule, learning_rate=1e-3)
    assert stretches(events, "student", until=3) == [replace(first, last_step=3)]
    assert stretches(events, "control") == []


def test_a_schedule_is_one_in_words_however_many_attempts_it_took() -> None:
    events = [
        START,
        *steps(range(1, 5)),
        replace(START, attempt=2, command="another", epochs=7),
        *steps(range(5, 11), world_size=1),
    ]
    (whole,) = stretches(events, "student")
    assert (whole.last_step, whole.world_sizes) == (10, (1, 2))
    assert (
        words_of([whole])
        == "learning rate 0.003, warm-up steps 2, then a cosine to 0.0001 at step 10"
    )


@pytest.mark.parametrize(
    ("start", "committed", "words"),
    [
        (START, {"student": 9}, ""),
        (START, {"student": 10, "control": 9}, ""),
        (START, {}, ""),  # it makes chunks
        (START, {"student": 10}, "nothing left to train: all 10 steps are committed"),
        (
            replace(START, total_steps=8),
            {"student": 10},
            "nothing left to train: 10 steps are committed, and 8 are asked for; these settings "
            "differ from those it was trained with "
            "and had no effect: steps = 8 (trained with 10)",
        ),
        (
            replace(START, learning_rate=1e-5, min_learning_rate=0.0),
            {"student": 10},
            "nothing left to train: all 10 steps are committed; these settings differ from those "
            "it was trained with and had no effect: "
            "student.learning_rate = 1e-05 (trained with 0.003), student.min_learning_rate = 0 "
            "(trained with 0.0001)",
        ),
    ],
    ids=[
        "a step left",
        "the control's step left",
        "no training",
        "the same",
        "fewer steps",
        "another schedule",
    ],
)
def test_a_command_with_nothing_left_to_train_says_what_had_no_effect(
    start: StartEvent, committed: dict[str, int], words: str
) -> None:
    assert asked([START, *steps(range(1, 11))], start, **committed) == words


def test_a_journal_without_schedules_still_tells_that_a_learning_rate_had_no_effect() -> None:
    earlier = [OLD, *steps(range(1, 11))]
    assert asked(earlier, START, student=10) == "nothing left to train: all 10 steps are committed"
    assert "student.learning_rate = 1e-05 (trained with up to 0.003)" in asked(
        earlier, replace(START, learning_rate=1e-5), student=10
    )
    late = [OLD, *steps(range(5, 11), learning_rate=1e-3)]  # the peak is not among its steps
    assert asked(late, START, student=10) == "nothing left to train: all 10 steps are committed"


@pytest.mark.parametrize(
    ("shape", "decay_steps", "words"),
    [
        ("linear", None, "then a line to 0.0001 at step 10"),
        ("wsd", 4, "then its peak until the last 4 steps, then a line to 0.0001 at step 10"),
        ("wsd", 1, "then its peak until the last step, then a line to 0.0001 at step 10"),
    ],
)
def test_other_schedules_than_a_cosine_are_told_and_a_change_of_them_is_noticed(
    shape: str, decay_steps: int | None, words: str
) -> None:
    start = replace(START, schedule=shape, decay_steps=decay_steps)
    rows = [start, *steps(range(1, 11))]
    assert words_of(stretches(rows, "student")) == f"learning rate 0.003, warm-up steps 2, {words}"
    committed = replace(START, committed_steps={"student": 10})
    assert f"student.schedule = cosine (trained with {shape})" in nothing_left(rows, committed)
