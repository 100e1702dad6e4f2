"""Retry: an unavailable store is waited for, reported once, and given up in the end; an error that
waiting cannot change is raised at once."""

from collections.abc import Callable

import pytest

from stillhouse.errors import StoreError
from stillhouse.retry import Outage, Patience, insist
from stillhouse.store import StoreUnavailable

PATIENCE = Patience(tell_after_s=60.0, end_after_s=1800.0, first_pause_s=0.5, last_pause_s=30.0)


class Clock:
    """A clock that stands still but for pauses."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def away_until(clock: Clock, moment: float) -> Callable[[], str]:
    def call() -> str:
        if clock.now < moment:
            raise StoreUnavailable(f"busy at {clock.now:.1f}")
        return "an answer"

    return call


def insisted(clock: Clock, call: Callable[[], str], told: list[tuple[float, str]]) -> str:
    return insist(
        call,
        patience=PATIENCE,
        tell=lambda *words: told.append(words),
        pause=clock.pause,
        clock=clock,
    )


def test_a_short_absence_is_not_told() -> None:
    clock, told = Clock(), list[tuple[float, str]]()
    assert insisted(clock, away_until(clock, 1050.0), told) == "an answer"
    assert told == []
    assert clock.pauses[:4] == [0.5, 1.0, 2.0, 4.0]


def test_a_long_absence_is_told_once_with_the_stores_words() -> None:
    clock, told = Clock(), list[tuple[float, str]]()
    assert insisted(clock, away_until(clock, 1900.0), told) == "an answer"
    ((seconds, why),) = told
    assert 60.0 <= seconds < 90.0
    assert why == f"busy at {1000.0 + seconds:.1f}"
    assert max(clock.pauses) == 30.0


def test_the_wait_has_an_end() -> None:
    clock, told = Clock(), list[tuple[float, str]]()
    with pytest.raises(
        StoreUnavailable,
        match=r"busy at .* after 1800 s of waiting it is given up.*run again to go on from there",
    ):
        insisted(clock, away_until(clock, 1e9), told)
    assert len(told) == 1
    assert 2800.0 <= clock.now < 2830.0


def test_what_waiting_cannot_mend_is_raised_at_once() -> None:
    def refuse() -> str:
        raise StoreError("the credentials have expired")

    clock = Clock()
    with pytest.raises(StoreError, match="expired"):
        insisted(clock, refuse, [])
    assert clock.pauses == []


def test_an_answer_ends_an_outage_and_the_next_begins_anew() -> None:
    clock, told = Clock(), list[tuple[float, str]]()
    outage = Outage(PATIENCE, tell=lambda *words: told.append(words), clock=clock)
    for _ in range(3):
        for seconds in (0.0, 61.0, 1700.0):
            clock.now += seconds
            outage.goes_on(StoreUnavailable("busy"))
        outage.is_over()
    assert [seconds for seconds, _ in told] == [61.0] * 3
