"""A journal boiled down to what the report says: which rows count, on which clock, and the verdict
in words.

Invariant: nothing is claimed that the rows do not show: no control, no evaluation, or a student
that got worse, and the verdict says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.tracking import (
    ChunkRow,
    EndRow,
    EvalRow,
    PoolRow,
    Role,
    Row,
    StartRow,
    Stretch,
    TrainRow,
    latest_train_rows,
    stretches,
)

_ROLES: tuple[Role, ...] = ("student", "control")
_SAME = 0.005  # nats: cross-entropies nearer than this are called equal


@dataclass(frozen=True, slots=True)
class Summary:
    """A run, with resumed steps and recomputed chunks counted once."""

    start: StartRow  # of the last attempt
    end: EndRow | None  # of the last attempt; None where it still runs or was killed
    num_attempts: int
    commands: list[str]  # each once, in the order in which they were first given
    first_time: float  # unix seconds
    run_s: float  # with the time between attempts left out
    idle_s: float  # between attempts
    # seconds on the run's own clock, which stops between attempts
    timeline: list[tuple[float, Row]]
    chunks: list[ChunkRow]  # in the order in which they were published
    student: list[TrainRow]
    control: list[TrainRow]
    trained: dict[Role, list[Stretch]]  # of each role that took a step: under which settings
    evals: dict[str, EvalRow]  # the last for each model

    @property
    def student_done(self) -> bool:
        return len(self.student) > 0 and self.student[-1].step >= self.start.total_steps

    @property
    def resumed_at(self) -> list[float]:
        """Seconds on the run's clock."""
        return [elapsed for elapsed, row in self.timeline if isinstance(row, StartRow)][1:]


def summarise(rows: Sequence[Row]) -> Summary | None:
    """None where no attempt has begun."""
    starts = [row for row in rows if isinstance(row, StartRow)]
    if not starts:
        return None
    timeline, idle_s = _timeline(rows)
    after_start = rows[rows.index(starts[-1]) :]
    trained: dict[Role, list[Stretch]] = {
        role: found for role in _ROLES if (found := stretches(rows, role))
    }
    chunks = {row.chunk: row for row in rows if isinstance(row, ChunkRow) and not row.duplicate}
    return Summary(
        start=starts[-1],
        end=next((row for row in after_start if isinstance(row, EndRow)), None),
        num_attempts=len(starts),
        commands=list(dict.fromkeys(row.command for row in starts)),
        first_time=rows[0].time,
        run_s=timeline[-1][0],
        idle_s=idle_s,
        timeline=timeline,
        chunks=sorted(chunks.values(), key=lambda row: row.time),
        student=latest_train_rows(rows, "student"),
        control=latest_train_rows(rows, "control"),
        trained=trained,
        evals={row.model: row for row in rows if isinstance(row, EvalRow)},
    )


def _timeline(rows: Sequence[Row]) -> tuple[list[tuple[float, Row]], float]:
    timeline: list[tuple[float, Row]] = []
    shift, elapsed = rows[0].time, 0.0
    for row in rows:
        if isinstance(row, StartRow):
            shift = row.time - elapsed
        elapsed = max(elapsed, row.time - shift)  # two machines' clocks may differ a little
        timeline.append((elapsed, row))
    return timeline, max(shift - rows[0].time, 0.0)


@dataclass(frozen=True, slots=True)
class Interval:
    """An amount that came evenly between two moments of the run's clock."""

    begin: float
    end: float
    amount: float


def teacher_tokens(summary: Summary) -> list[Interval]:
    return [
        Interval(max(at - row.seconds, 0.0), at, row.num_tokens)
        for at, row in summary.timeline
        if isinstance(row, ChunkRow) and not row.duplicate
    ]


def train_tokens(summary: Summary, role: Role) -> list[Interval]:
    """Steps that were taken again count each time: they took their time each time."""
    return [
        Interval(max(at - row.seconds, 0.0), at, row.num_tokens)
        for at, row in _train_rows(summary, role)
    ]


def data_waits(summary: Summary) -> list[Interval]:
    """Seconds in which the student waited for chunks."""
    return [
        Interval(max(at - row.seconds, 0.0), at, row.data_wait_s)
        for at, row in _train_rows(summary, "student")
    ]


def window_waits(summary: Summary) -> list[Interval]:
    """Seconds in which the window held the teachers back: the growth of a count that begins anew
    with each attempt."""
    waits, last_at, last_wait_s = [], 0.0, 0.0
    for at, row in summary.timeline:
        if isinstance(row, StartRow):
            last_at, last_wait_s = at, 0.0
        if isinstance(row, PoolRow):
            waits.append(Interval(last_at, at, max(row.window_wait_s - last_wait_s, 0.0)))
            last_at, last_wait_s = at, row.window_wait_s
    return waits


def _train_rows(summary: Summary, role: Role) -> list[tuple[float, TrainRow]]:
    return [
        (at, row) for at, row in summary.timeline if isinstance(row, TrainRow) and row.role == role
    ]


def per_second(intervals: Sequence[Interval], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean rate of what falls between each two neighbouring edges."""
    begin, end, amount = (
        np.array([(each.begin, each.end, each.amount) for each in intervals]).reshape(-1, 3).T
    )
    length = np.maximum(end - begin, 1e-9)
    arrived = [float(np.sum(amount * np.clip((edge - begin) / length, 0.0, 1.0))) for edge in edges]
    return np.diff(arrived) / np.diff(edges)


def mean_rate(intervals: Sequence[Interval]) -> float:
    """Amount for each second between the first beginning and the last end."""
    span = max(each.end for each in intervals) - min(each.begin for each in intervals)
    return sum(each.amount for each in intervals) / max(span, 1e-9)


def verdict(summary: Summary) -> str:
    """One or two sentences: what was achieved, against what, and how far that can be trusted."""
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
    if control is None:
        kl = "" if student.kl is None else f", and KL(teacher ‖ student) is {student.kl:.2f}"
        return (
            f"The distilled student{short} reaches a held-out cross-entropy of {reached} nats a "
            f"token{beside}{kl}. "
            "No control was evaluated, so this does not show what distillation gained over "
            "training on the text alone."
        )
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
            f"The distilled student{short} did worse than {same_text}: "
            f"a held-out cross-entropy of {reached} against {others} nats a token, {tokens}."
        )
    gap = f": {_gap_closed(teacher, student, control)}" if teacher else ""
    return (
        f"The distilled student{short} reaches a held-out cross-entropy of {reached} nats a "
        f"token, against {others} "
        f"for {same_text}{gap}, {tokens}."
    )


def _gap_closed(teacher: EvalRow, student: EvalRow, control: EvalRow) -> str:
    gap = control.cross_entropy - teacher.cross_entropy
    if gap <= 0:
        return "better than its teacher, which the control had passed as well"
    if student.cross_entropy <= teacher.cross_entropy:
        return "the whole gap closed, and no worse than its teacher"
    closed = (control.cross_entropy - student.cross_entropy) / gap
    return f"{100 * closed:.0f}\N{NARROW NO-BREAK SPACE}% of the gap closed"


def _tokens_compared(summary: Summary, student: EvalRow, control: EvalRow) -> str:
    ours = sum(row.num_tokens for row in summary.student if row.step <= student.step)
    theirs = sum(row.num_tokens for row in summary.control if row.step <= control.step)
    if not ours or not theirs:
        return "over numbers of training tokens that the journal does not hold"
    if abs(ours - theirs) <= 0.001 * theirs:
        return "at equal tokens"
    return f"at unequal tokens: {ours:,} for the student, {theirs:,} for the control"


def _without_evaluation(summary: Summary) -> str:
    total = summary.start.total_steps
    if not summary.student:
        return (
            f"No step was taken yet; {len(summary.chunks):,} of {summary.start.num_chunks:,} "
            "chunks came out of this run's teachers."
        )
    last = summary.student[-1]
    how = (
        f"loss {last.loss:.2f}"
        if last.divergence is None
        else f"divergence from the teacher {last.divergence:.2f}"
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
