"""The view of a journal on a terminal: progress bars, or plain lines."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, Group
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
    PhaseEvent,
    PoolEvent,
    RunEvent,
    StallEvent,
    StartEvent,
    TeacherEvent,
    TrainEvent,
    WaitEvent,
)
from stillhouse.tracking.generation import GenerationEvent, WriterEvent

_SAY_EVERY_S = 60.0
_RATE_OVER_S = 60.0
_WIDE = 120  # columns, from which on both bars fit side by side


class ProgressView:
    """Two bars, of teachers and student, below the phase that the run is in; where the output is no
    terminal, at most one plain line every `every_s` seconds, and one for each phase of the run.

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
        elif isinstance(event, GenerationEvent):
            self._latest = _Latest(generation=event)
        elif not self._latest.take(event):
            return
        self._is_stale = True
        is_new_phase = isinstance(event, PhaseEvent) and event.who == "run"
        if is_new_phase or self._clock() - self._last_shown >= self._every_s:
            self._show()

    def tick(self) -> None:
        """Let the times of phases go on, on a terminal."""
        if self._live is not None and self._live.is_started:
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
        phase = self._latest.phases.get("run")
        in_words = "" if phase is None else _since(phase.phase, phase.time, self._clock())
        sides = self._sides()
        if self._live is None:
            parts = [in_words] * bool(in_words) + [f"{side.title}{side.details}" for side in sides]
            self._console.print(Text(one_line(" | ".join(parts))), soft_wrap=True)
            return
        self._live.start()
        width = self._console.width
        shown = [Text(one_line(in_words), "bold")] if in_words else []
        bars = _side_by_side(sides) if width >= _WIDE else _stacked(sides, width)
        self._live.update(Group(*shown, bars), refresh=True)

    def _sides(self) -> "list[_Side]":
        """Of an attempt; a command that only evaluates has none, and one that generates has one."""
        latest, now = self._latest, self._clock()
        if latest.generation is not None:
            return [_workers_side(latest, now)]
        if latest.start is None and latest.phases:
            return []
        return [_workers_side(latest, now), _student_side(latest, now)]


def _side_by_side(sides: Sequence["_Side"]) -> Table:
    grid = Table.grid(padding=(0, 3), expand=True)
    for _ in sides:
        grid.add_column(ratio=1, no_wrap=True)
    grid.add_row(*(Text(one_line(side.title)) for side in sides))
    grid.add_row(*(side.bar for side in sides))
    grid.add_row(*(Text(side.details.removeprefix(", ")) for side in sides))
    return grid


def _stacked(sides: Sequence["_Side"], width: int) -> Table:
    grid = Table.grid(expand=True)
    grid.add_column(no_wrap=True)
    for side in sides:
        fits = len(side.title + side.details) <= width
        lines = [side.title + side.details] if fits else [side.title, side.details[2:]]
        for line in lines:
            grid.add_row(Text(one_line(line)))
        grid.add_row(side.bar)
    return grid


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
        return _clock_time((total - last) * (end - begin) / (last - first))


class _Rate:
    """Tokens a second over the last minute: of one chunk or step it would jump about."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, float]] = deque()  # end, seconds, tokens

    def add(self, end: float, seconds: float, num_tokens: float) -> None:
        self._seen.append((end, seconds, num_tokens))
        while self._seen[0][0] < end - _RATE_OVER_S:
            self._seen.popleft()

    def __str__(self) -> str:
        seconds = sum(seconds for _, seconds, _ in self._seen)
        return f"{sum(num for _, _, num in self._seen) / seconds if seconds else 0.0:,.0f} tokens/s"


@dataclass(slots=True)
class _Latest:
    """The newest events of an attempt, and how fast its counts grow."""

    start: StartEvent | None = None
    generation: GenerationEvent | None = None
    wait: WaitEvent | None = None
    pool: PoolEvent | None = None
    train: TrainEvent | None = None
    phases: dict[str, PhaseEvent] = field(default_factory=dict)  # of whom they are the phase
    num_ready: int = 0  # teachers, or writers, so far
    heldout: HeldoutEvent | None = None
    pool_pace: _Pace = field(default_factory=_Pace)
    train_pace: _Pace = field(default_factory=_Pace)
    pool_rate: _Rate = field(default_factory=_Rate)
    train_rate: _Rate = field(default_factory=_Rate)

    @property
    def worker(self) -> str:
        """What the workers of the pool are called."""
        return "teacher" if self.generation is None else "writer"

    def take(self, event: RunEvent) -> bool:
        """Keep an event; False where it is of a kind that the bars do not show."""
        # what is waited for, and who is ready
        match event:
            case WaitEvent():
                self.wait = event if event.missing else None
            case PhaseEvent():
                self._enter(event)
            case TeacherEvent() | WriterEvent():
                self.num_ready += 1
            # both sides' latest numbers, and how fast they change
            case PoolEvent():
                before = event.time if self.pool is None else self.pool.time
                self.pool = event
                self.pool_pace.add(event.time, event.published)
                seconds = event.time - before
                self.pool_rate.add(event.time, seconds, seconds * event.tokens_per_s)
            case TrainEvent():
                if self.train is not None and self.train.role != event.role:
                    self.train_pace, self.train_rate = _Pace(), _Rate()
                self.train = event
                self.phases.pop(event.role, None)
                self.train_pace.add(event.time, event.step)
                self.train_rate.add(event.time, event.seconds, event.num_tokens)
            case HeldoutEvent():
                self.heldout = event
            case _:
                return False
        return True

    def _enter(self, event: PhaseEvent) -> None:
        """A part is in a new phase. That of the whole run ends where a part begins one."""
        if event.who != "run":
            self.phases.pop("run", None)
        self.phases[event.who] = event


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two bars with its words; `details` begin with a comma, or are empty."""

    title: str
    details: str
    bar: ProgressBar


def _workers_side(latest: _Latest, now: float) -> _Side:
    pool = latest.pool
    if pool is None or (pool.published == 0 and pool.replicas == 0):
        return _Side(_workers_to_come(latest, now), "", ProgressBar(total=1, completed=0))
    window = f"window {pool.window_chunks}, " if latest.generation is None else ""
    details = (
        f", {pool.in_flight} in flight, {window}{latest.pool_rate}, "
        f"ETA {latest.pool_pace.eta(pool.needed)}"
    )
    bar = ProgressBar(total=max(pool.needed, 1), completed=pool.published)
    blocks = "chunks" if latest.generation is None else "shards"
    return _Side(f"{latest.worker}s {pool.published}/{pool.needed} {blocks}", details, bar)


def _workers_to_come(latest: _Latest, now: float) -> str:
    if latest.train is not None:
        return "no teachers at work"
    if latest.wait is not None:
        return f"waiting for machines to join the cluster: {latest.wait.missing}"
    if (phase := latest.phases.get(latest.worker)) is None:
        return f"{latest.worker}s: starting"
    asked = None if latest.start is None else latest.start.num_teachers
    if latest.generation is not None:
        asked = latest.generation.num_writers
    ready = "" if asked is None else f", {latest.num_ready} of {asked} ready"
    return f"{latest.worker}s: {_since(phase.phase, phase.time, now)}{ready}"


def _student_side(latest: _Latest, now: float) -> _Side:
    # loading, or not there yet
    for who in ("student", "control"):
        if (phase := latest.phases.get(who)) is not None:
            title = f"{who}: {_since(phase.phase, phase.time, now)}"
            return _Side(title, "", ProgressBar(total=1, completed=0))
    if (train := latest.train) is None:
        return _Side("student: waiting for its first step", "", ProgressBar(total=1, completed=0))

    # its steps
    steps = latest.start.total_steps if latest.start else train.step
    waiting = train.data_wait_s / train.seconds if train.seconds else 0.0
    has_constant = latest.start is not None and latest.start.loss_constant
    loss = "loss + constant" if has_constant and train.role == "student" else "loss"
    score, heldout = "", latest.heldout
    if heldout is not None and heldout.role == train.role:
        score = f", held-out KL {heldout.kl:.3f}"
    details = (
        f", {loss} {train.loss:.3f}{score}, {latest.train_rate}, waiting {waiting:.0%}, "
        f"ETA {latest.train_pace.eta(steps)}"
    )
    bar = ProgressBar(total=max(steps, 1), completed=train.step)
    return _Side(f"{train.role} {train.step}/{steps} steps", details, bar)


def _since(phase: str, begin: float, now: float) -> str:
    """A phase and how long it has lasted."""
    return f"{phase}, {_clock_time(max(0.0, now - begin))}"


def _clock_time(seconds: float) -> str:
    """As on a clock: 0:07, 12:30, 1:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
            is_worker = event.role in ("teacher", "writer")
            rank = "" if is_worker else f", rank {event.rank}, step {event.step},"
            who = f"{event.role} {event.rank}" if is_worker else f"{event.role}{rank}"
            block = "shard" if event.role == "writer" else "chunk"
            chunk = "" if event.chunk is None else f", {block} {event.chunk}"
            return (
                f"{who} stood still for {event.seconds:.0f} s ({event.phase}{chunk}): it is killed "
                "and replaced"
            )
    return None
