"""The terminal of a command: messages beside its progress bars, and a journal that says there that
it waits for room."""

from collections.abc import Callable
from time import sleep

from rich.console import Console

from stillhouse.terminal import printable
from stillhouse.tracking import PatientTracker, Tracker


def say(words: str) -> None:
    """Print a message on the terminal; it tears no progress bar."""
    Console(stderr=True, soft_wrap=True).print(printable(words), markup=False, highlight=False)


def tell_of_wait(seconds: float, why: str) -> None:
    """Print what the run waits for, and for how long so far."""
    say(f"the run has waited for {seconds:.0f} s: {why}")


def patient(journal: Tracker, *, pause: Callable[[float], None] = sleep) -> PatientTracker:
    """The journal as a tracker that waits while its disk is full, and says so on the terminal.
    `pause` sleeps; it may raise to end the wait."""
    return PatientTracker(tracker=journal, tell=tell_of_wait, pause=pause)
