"""What a command says on the terminal, beside what its views show, and the journal that waits for
room and says so there."""

from collections.abc import Callable
from time import sleep

from rich.console import Console

from stillhouse.terminal import printable
from stillhouse.tracking import PatientTracker, Tracker


def say(words: str) -> None:
    """Tell it on the terminal, beside what the views show."""
    Console(stderr=True, soft_wrap=True).print(printable(words), markup=False, highlight=False)


def tell_of_wait(seconds: float, why: str) -> None:
    """Say on the terminal what the run waits for."""
    say(f"the run has waited for {seconds:.0f} s: {why}")


def patient(journal: Tracker, *, pause: Callable[[float], None] = sleep) -> PatientTracker:
    """The journal as a tracker that waits while its disk is full, and says so on the terminal.
    `pause` may raise to end a wait."""
    return PatientTracker(tracker=journal, tell=tell_of_wait, pause=pause)
