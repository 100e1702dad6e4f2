"""A run as its report needs it: the journal's events that count, on one clock, and the verdict.

Invariant: the verdict claims nothing that the events do not show. Where no control or no evaluation
was recorded, or the student got worse, the verdict says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from stillhouse.tracking import (
    ChunkEvent,
    EndEvent,
    EvalEvent,
    GenerationEvent,
    HeldoutEvent,
    PoolEvent,
    Role,
    RunEvent,
    StartEvent,
    Stretch,
    TrainEvent,
    latest_heldout_events,
    latest_train_events,
    stretches,
)

_ROLES: tuple[Role, ...] = ("student", "control")
_SAME = 0.005  # nats: cross-entropies nearer than this are called equal

Kind = TypeVar("Kind", bound=RunEvent)
StartT = TypeVar("StartT", bound=RunEvent)
Timeline = Sequence[tuple[float, RunEvent]]  # seconds on the run's own clock, and the event


@dataclass(frozen=True, slots=True)
class Attempts(Generic[StartT]):
    """All attempts of one directory. Its own clock stands still between them."""

    start: StartT  # of the last attempt
    end: EndEvent | None  # of the last attempt; None where it still runs or was killed
    commands: list[str]  # each once, in the order in which they were first given
    first_time: float  # unix seconds
    idle_s: float  # between attempts
    timeline: Timeline

    @property
    def run_s(self) -> float:
        """Seconds that it took, without the time between attempts."""
        return self.timeline[-1][0]

    @property
    def num_attempts(self) -> int:
        return len(of_kind(self.timeline, type(self.start)))

    @property
    def resumed_at(self) -> list[float]:
        """Seconds on its clock at which each attempt but the first began."""
        return [elapsed_s for elapsed_s, _ in of_kind(self.timeline, type(self.start))][1:]


@dataclass(frozen=True, slots=True)
class Summary(Attempts[StartEvent]):
    """A run, with resumed steps and recomputed chunks counted once."""

    chunks: list[ChunkEvent]  # in the order in which they were published
    student: list[TrainEvent]
    control: list[TrainEvent]
    heldout: dict[Role, list[HeldoutEvent]]  # scores while each role learned, by step
    trained: dict[Role, list[Stretch]]  # the schedules of each role that took a step
    evals: dict[str, EvalEvent]  # the last for each model

    @property
    def student_done(self) -> bool:
        return len(self.student) > 0 and self.student[-1].step >= self.start.total_steps


def of_kind(timeline: Timeline, kind: type[Kind]) -> list[tuple[float, Kind]]:
    """The events of one kind, each with its time."""
    return [(at, event) for at, event in timeline if isinstance(event, kind)]


def summarise(events: Sequence[RunEvent]) -> Summary | None:
    """The summary of a journal; None where no attempt has begun."""
    attempts = attempts_in(events, begins=StartEvent)
    if attempts is None:
        return None
    chunks = {
        event.chunk: event
        for event in events
        if isinstance(event, ChunkEvent) and not event.duplicate
    }
    return Summary(
        **attempts,
        chunks=sorted(chunks.values(), key=lambda event: event.time),
        student=latest_train_events(events, "student"),
        control=latest_train_events(events, "control"),
        heldout={role: latest_heldout_events(events, role) for role in _ROLES},
        trained={role: found for role in _ROLES if (found := stretches(events, role))},
        evals={event.model: event for event in events if isinstance(event, EvalEvent)},
    )


def attempts_in(
    events: Sequence[RunEvent], *, begins: type[StartEvent | GenerationEvent]
) -> dict[str, Any] | None:
    """The fields of `Attempts`, which begin with events of the kind `begins`; None where none has
    begun."""
    starts = [event for event in events if isinstance(event, begins)]
    if not starts:
        return None
    timeline, idle_s = _timeline_of(events, begins=begins)
    last_attempt = events[events.index(starts[-1]) :]
    return {
        "start": starts[-1],
        "end": next((event for event in last_attempt if isinstance(event, EndEvent)), None),
        "commands": list(dict.fromkeys(start.command for start in starts)),
        "first_time": events[0].time,
        "idle_s": idle_s,
        "timeline": timeline,
    }


def _timeline_of(events: Sequence[RunEvent], *, begins: type[RunEvent]) -> tuple[Timeline, float]:
    """The events on the run's clock, and the seconds between attempts that it leaves out. An
    attempt begins with an event of the kind `begins`."""
    timeline: list[tuple[float, RunEvent]] = []
    shift, elapsed = events[0].time, 0.0
    for event in events:
        if isinstance(event, begins):
            shift = event.time - elapsed
        elapsed = max(elapsed, event.time - shift)  # two machines' clocks may differ a little
        timeline.append((elapsed, event))
    return timeline, max(shift - events[0].time, 0.0)


# ---- Rates


@dataclass(frozen=True, slots=True)
class Interval:
    """An amount that came evenly between two moments of the run's clock."""

    begin: float
    end: float
    amount: float


def teacher_tokens(summary: Summary) -> list[Interval]:
    """Target tokens of each chunk that this run published."""
    return [
        Interval(max(at - chunk.seconds, 0.0), at, chunk.num_tokens)
        for at, chunk in of_kind(summary.timeline, ChunkEvent)
        if not chunk.duplicate
    ]


def train_tokens(summary: Summary, role: Role) -> list[Interval]:
    """Target tokens of each step. A step that was taken again counts each time, as its time
    does."""
    return [
        Interval(max(at - step.seconds, 0.0), at, step.num_tokens)
        for at, step in of_kind(summary.timeline, TrainEvent)
        if step.role == role
    ]


def data_waits(summary: Summary) -> list[Interval]:
    """Seconds of each step in which the student waited for chunks."""
    return [
        Interval(max(at - step.seconds, 0.0), at, step.data_wait_s)
        for at, step in of_kind(summary.timeline, TrainEvent)
        if step.role == "student"
    ]


def window_waits(summary: Summary) -> list[Interval]:
    """Seconds in which the window held the teachers back: the growth of a count that begins anew
    with each attempt."""
    waits, last_at, last_wait_s = [], 0.0, 0.0
    for at, event in summary.timeline:
        if isinstance(event, StartEvent):
            last_at, last_wait_s = at, 0.0
        if isinstance(event, PoolEvent):
            waits.append(Interval(last_at, at, max(event.window_wait_s - last_wait_s, 0.0)))
            last_at, last_wait_s = at, event.window_wait_s
    return waits


def per_second(intervals: Sequence[Interval], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean rate between each two neighbouring edges: E edges give E - 1 rates."""
    begin, end, amount = (
        np.array([(each.begin, each.end, each.amount) for each in intervals]).reshape(-1, 3).T
    )
    length = np.maximum(end - begin, 1e-9)
    arrived = [float(np.sum(amount * np.clip((edge - begin) / length, 0.0, 1.0))) for edge in edges]
    return np.diff(arrived) / np.diff(edges)


def mean_rate(intervals: Sequence[Interval]) -> float:
    """Amount for each second between the first beginning and the last end."""
    span_s = max(each.end for each in intervals) - min(each.begin for each in intervals)
    return sum(each.amount for each in intervals) / max(span_s, 1e-9)


# ---- The verdict


def verdict(summary: Summary) -> str:
    """One or two sentences: what was achieved, against what, and how far that can be trusted."""
    # How far the student was trained, and how good its teacher is.
    if (student := summary.evals.get("student")) is None:
        return _without_evaluation(summary)
    teacher, control = summary.evals.get("teacher"), summary.evals.get("control")
    beside = f" (teacher: {teacher.cross_entropy:.2f})" if teacher else ""
    short = (
        f" after {student.step:,} of {summary.start.total_steps:,} steps"
        if student.step < summary.start.total_steps
        else ""
    )
    reached = f"{student.cross_entropy:.2f}"

    # Without a teacher there is no gain to ask for; without a control it is not known.
    if summary.start.teacher is None:
        return (
            f"The student{short}, trained on the text alone, reaches a held-out cross-entropy of "
            f"{reached} nats a token."
        )
    if control is None:
        kl = "" if student.kl is None else f", and KL(teacher ‖ student) is {student.kl:.2f}"
        return (
            f"The distilled student{short} reaches a held-out cross-entropy of {reached} nats a "
            f"token{beside}{kl}. No control was evaluated, so this does not show what distillation "
            "gained over training on the text alone."
        )

    # Against the control: equal, worse or better, with a third digit where they are close.
    same_text = f"the same student trained on the text alone{beside}"
    others = f"{control.cross_entropy:.2f}"
    gain = control.cross_entropy - student.cross_entropy
    tokens = _tokens_compared(summary, student, control)
    if abs(gain) < _SAME:
        return (
            f"Distillation made no difference: the student{short} and {same_text} both reach "
            f"{reached} nats a token held out, {tokens}."
        )
    if abs(gain) < 4 * _SAME:
        reached, others = f"{student.cross_entropy:.3f}", f"{control.cross_entropy:.3f}"
    if gain < 0:
        return (
            f"The distilled student{short} did worse than {same_text}: a held-out cross-entropy of "
            f"{reached} against {others} nats a token, {tokens}."
        )
    gap = f": {_gap_closed(teacher, student, control)}" if teacher else ""
    return (
        f"The distilled student{short} reaches a held-out cross-entropy of {reached} nats a "
        f"token, against {others} for {same_text}{gap}, {tokens}."
    )


def _gap_closed(teacher: EvalEvent, student: EvalEvent, control: EvalEvent) -> str:
    """Which share of the control's distance to the teacher the student made good, in words."""
    gap = control.cross_entropy - teacher.cross_entropy
    if gap <= 0:
        return "better than its teacher, which the control had passed as well"
    if student.cross_entropy <= teacher.cross_entropy:
        return "the whole gap closed, and no worse than its teacher"
    closed = (control.cross_entropy - student.cross_entropy) / gap
    return f"{100 * closed:.0f}\N{NARROW NO-BREAK SPACE}% of the gap closed"


def _tokens_compared(summary: Summary, student: EvalEvent, control: EvalEvent) -> str:
    """On how many training tokens the two were compared, in words."""
    ours = sum(each.num_tokens for each in summary.student if each.step <= student.step)
    theirs = sum(each.num_tokens for each in summary.control if each.step <= control.step)
    if not ours or not theirs:
        return "over numbers of training tokens that the journal does not hold"
    if abs(ours - theirs) <= 0.001 * theirs:
        return "at equal tokens"
    return f"at unequal tokens: {ours:,} for the student, {theirs:,} for the control"


def _without_evaluation(summary: Summary) -> str:
    """The verdict on a run without an evaluation: how far it is."""
    total = summary.start.total_steps
    if not summary.student:
        return (
            f"No step was taken yet; {len(summary.chunks):,} of {summary.start.num_chunks:,} "
            "chunks came out of this run's teachers."
        )
    last = summary.student[-1]
    constant = ", with a constant," if summary.start.loss_constant else ""
    how = (
        f"loss {last.loss:.2f}"
        if last.divergence is None
        else f"divergence from the teacher{constant} {last.divergence:.2f}"
    )
    if summary.student_done:
        all_steps = max(total, last.step)  # fewer may be asked for than were taken
        return (
            f"The student was trained for all of its {all_steps:,} steps ({how} nats a token "
            "at the last), and not evaluated yet."
        )
    return (
        f"Training stands at step {last.step:,} of {total:,} ({how} nats a token), and nothing "
        "was evaluated yet."
    )
