"""The view of a journal on a terminal: progress bars, or plain lines."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stillhouse.terminal import one_line
from stillhouse.tracking.events import (
    DelayEvent,
    EarlyStopEvent,
    HeldoutEvent,
    OutageEvent,
    PoolEvent,
    RunEvent,
    StallEvent,
    StartEvent,
    TrainEvent,
    WaitEvent,
)

_SAY_EVERY_S = 60.0


class ProgressView:
    """Two bars side by side, teachers and student; where the output is no terminal, at most one
    plain line every `every_s` seconds.

    Outages, delays and stalls are lines in between, at most one a minute: one cause may meet many
    processes at once.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.time,
        every_s: float = 10.0,
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        is_terminal = self._console.is_terminal
        self._every_s = 0.1 if is_terminal else every_s
        self._last_shown = self._last_said = -math.inf
        self._is_stale = False
        self._latest = _Latest()
        self._live = Live(console=self._console, auto_refresh=False) if is_terminal else None

    def record(self, event: RunEvent) -> None:
        """Show an event, now or with the next one."""
        # Lines in between, which leave the bars as they are.
        if (line := _incident_line(event)) is not None:
            self._say(line)
            return

        # The bars.
        if isinstance(event, StartEvent):
            self._latest = _Latest(start=event)
        elif not self._latest.take(event):
            return
        self._is_stale = True
        if self._clock() - self._last_shown >= self._every_s:
            self._show()

    def _say(self, line: str) -> None:
        """Print a line in between, or leave it out where the last one is too recent."""
        if self._clock() - self._last_said >= _SAY_EVERY_S:
            self._last_said = self._clock()
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Show the newest state, and stop drawing."""
        if self._is_stale:
            self._show()
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        self._last_shown, self._is_stale = self._clock(), False
        sides = [_teachers_side(self._latest), _student_side(self._latest)]
        if self._live is None:
            line = " | ".join(f"{side.title}{side.details}" for side in sides)
            self._console.print(Text(one_line(line)), soft_wrap=True)
            return
        grid = Table.grid(padding=(0, 3), expand=True)
        for _ in sides:
            grid.add_column(ratio=1)
        grid.add_row(*(Text(one_line(side.title)) for side in sides))
        grid.add_row(*(side.bar for side in sides))
        grid.add_row(*(Text(side.details.removeprefix(", ")) for side in sides))
        self._live.start()
        self._live.update(grid, refresh=True)


class _Pace:
    """How fast a count grows, over the last times that it was seen."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=32)

    def add(self, seconds: float, count: int) -> None:
        self._seen.append((seconds, count))

    def eta(self, total: int) -> str:
        """The time to come until the count is `total`; a question mark while it is not known."""
        (begin, first), (end, last) = self._seen[0], self._seen[-1]
        if last <= first:
            return "?"
        minutes, seconds = divmod(round((total - last) * (end - begin) / (last - first)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass(slots=True)
class _Latest:
    """The newest events of an attempt, and how fast its counts grow."""

    start: StartEvent | None = None
    wait: WaitEvent | None = None
    pool: PoolEvent | None = None
    train: TrainEvent | None = None
    heldout: HeldoutEvent | None = None
    pool_pace: _Pace = field(default_factory=_Pace)
    train_pace: _Pace = field(default_factory=_Pace)

    def take(self, event: RunEvent) -> bool:
        """Keep an event; False where it is of a kind that the bars do not show."""
        match event:
            case WaitEvent():
                self.wait = event if event.missing else None
            case PoolEvent():
                self.pool = event
                self.pool_pace.add(event.time, event.published)
            case TrainEvent():
                if self.train is not None and self.train.role != event.role:
                    self.train_pace = _Pace()
                self.train = event
                self.train_pace.add(event.time, event.step)
            case HeldoutEvent():
                self.heldout = event
            case _:
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two bars with its words; `details` begin with a comma, or are empty."""

    title: str
    details: str
    bar: ProgressBar


def _teachers_side(latest: _Latest) -> _Side:
    if (pool := latest.pool) is None:
        title = "teachers: starting" if latest.train is None else "no teachers at work"
        if latest.wait is not None and latest.train is None:
            title = f"waiting for machines to join the cluster: {latest.wait.missing}"
        return _Side(title, "", ProgressBar(total=1, completed=0))
    details = (
        f", {pool.in_flight} in flight, window {pool.window_chunks}, "
        f"{pool.tokens_per_s:,.0f} tokens/s, ETA {latest.pool_pace.eta(pool.needed)}"
    )
    bar = ProgressBar(total=max(pool.needed, 1), completed=pool.published)
    return _Side(f"teachers {pool.published}/{pool.needed} chunks", details, bar)


def _student_side(latest: _Latest) -> _Side:
    if (train := latest.train) is None:
        return _Side("student: waiting for its first step", "", ProgressBar(total=1, completed=0))
    steps = latest.start.total_steps if latest.start else train.step
    waiting = train.data_wait_s / train.seconds if train.seconds else 0.0
    has_constant = latest.start is not None and latest.start.loss_constant
    constant = " (with a constant)" if has_constant and train.role == "student" else ""
    score, heldout = "", latest.heldout
    if heldout is not None and heldout.role == train.role:
        score = f", held-out KL {heldout.kl:.3f}"
    details = (
        f", loss {train.loss:.3f}{constant}{score}, {train.tokens_per_s:,.0f} tokens/s, "
        f"waiting {waiting:.0%}, ETA {latest.train_pace.eta(steps)}"
    )
    bar = ProgressBar(total=max(steps, 1), completed=train.step)
    return _Side(f"{train.role} {train.step}/{steps} steps", details, bar)


def _incident_line(event: RunEvent) -> str | None:
    """The line for an event that ends a training early, stops a process or makes it wait; None for
    all others."""
    match event:
        case DelayEvent():
            return (
                f"the {event.role}'s checkpoint of step {event.step} cannot be written yet: "
                f"{event.why}"
            )
        case EarlyStopEvent():
            return (
                f"the {event.role} stops early, after step {event.step}: its held-out KL was "
                f"lowest after step {event.best_step}, {event.best_kl:.3f}"
            )
        case OutageEvent():
            return f"{event.who} has waited for {event.seconds:.0f} s: {event.why}"
        case StallEvent():
            is_teacher = event.role == "teacher"
            rank = "" if is_teacher else f", rank {event.rank}, step {event.step},"
            who = f"teacher {event.rank}" if is_teacher else f"{event.role}{rank}"
            chunk = "" if event.chunk is None else f", chunk {event.chunk}"
            return (
                f"{who} stood still for {event.seconds:.0f} s ({event.phase}{chunk}): it is killed "
                "and replaced"
            )
    return None
