"""Where the time of students and teachers went, from the journal's rows alone.

Invariant: each moment of a side's time is in one part, so the parts add up: to the run's time for
the students, whose ranks step together, and to the run's time for each teacher that was asked for.

Times are seconds on the run's own clock, which stands still between attempts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillhouse.report.summary import Interval, Summary
from stillhouse.tracking import (
    CheckpointRow,
    ChunkRow,
    DelayRow,
    EndRow,
    NoticeRow,
    OutageRow,
    PoolRow,
    RecoveryRow,
    RepairRow,
    Role,
    Row,
    SetAsideRow,
    StallRow,
    StartRow,
    TeacherRow,
    TrainRow,
)

Part = Literal[
    "useful", "waiting", "checkpointing", "starting", "restarting", "redone", "other", "released"
]
PARTS: tuple[Part, ...] = (
    "useful",
    "waiting",
    "checkpointing",
    "starting",
    "restarting",
    "redone",
    "other",
    "released",
)
Span = tuple[float, float]
Spent = dict[Part, float]


@dataclass(frozen=True, slots=True)
class TimeSpent:
    """The time of one side, by what came of it. Waiting is for chunks (students) or for the window
    (teachers)."""

    seconds: Mapping[Part, float]  # every part; of teachers the sum over all of them

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def share(self, part: Part) -> float:
        return self.seconds[part] / max(self.total_s, 1e-9)

    @property
    def goodput(self) -> float:
        """The useful share of the time until the side's work was done and its processors were given
        back."""
        return self.seconds["useful"] / max(self.total_s - self.seconds["released"], 1e-9)


@dataclass(frozen=True, slots=True)
class Recovery:
    """Training stood still, and went on."""

    at: float  # when it went on
    whose: str  # student, control, or run
    cause: str
    seconds: float
    lost_steps: int  # that were taken again
    detail: str


@dataclass(frozen=True, slots=True)
class _Attempt:
    number: int  # from 0
    begin: float
    end: float
    rows: Sequence[tuple[float, Row]]

    @property
    def start(self) -> StartRow:
        first = self.rows[0][1]
        assert isinstance(first, StartRow)
        return first

    @property
    def outcome(self) -> str | None:
        """None where it was killed, or goes on."""
        return next((row.outcome for _, row in self.rows if isinstance(row, EndRow)), None)

    def train_rows(self) -> list[tuple[float, TrainRow]]:
        return [(at, row) for at, row in self.rows if isinstance(row, TrainRow)]


def student_time(summary: Summary) -> TimeSpent | None:
    """None where no step was taken."""
    attempts = _attempts(summary)
    counted = {(row.role, row.step): index for index, row in enumerate(_steps(attempts))}
    if not counted:
        return None
    spent: Spent = dict.fromkeys(PARTS, 0.0)
    index = 0
    for attempt in attempts:
        index = _spend_attempt(attempt, spent, counted, index)
    return TimeSpent(spent)


def _spend_attempt(
    attempt: _Attempt, spent: Spent, counted: Mapping[tuple[Role, int], int], index: int
) -> int:
    """Add an attempt's time to `spent`; `index` counts the steps of all attempts, and is returned
    as it then stands."""
    total_steps = attempt.start.total_steps
    saving = _spans(
        _blocked(at, row, total_steps) for at, row in attempt.rows if isinstance(row, CheckpointRow)
    )
    standing = _spans(
        (at - row.seconds, at) for at, row in attempt.rows if isinstance(row, RecoveryRow)
    )
    first_start: Part = "starting" if attempt.number == 0 else "restarting"
    cursor, before = attempt.begin, None
    for at, row in attempt.train_rows():
        begin = max(at - row.seconds, cursor)
        if before is None:
            spent[first_start] += begin - cursor
        elif row.role != before.role:
            _divide(spent, (cursor, begin), [("checkpointing", saving)], rest="starting")
        elif row.step != before.step + 1:
            spent["restarting"] += begin - cursor
        else:
            _divide(
                spent,
                (cursor, begin),
                [("restarting", standing), ("checkpointing", saving)],
                rest="other",
            )
        cursor = max(at, begin)
        waited = min(row.data_wait_s, cursor - begin)
        if counted[row.role, row.step] == index:
            spent["waiting"] += waited
            spent["useful"] += cursor - begin - waited
        else:
            spent["redone"] += cursor - begin
        before, index = row, index + 1
    if before is None:
        spent["released" if attempt.outcome == "done" else first_start] += attempt.end - cursor
    else:
        rest: Part = "released" if before.step >= total_steps else "other"
        _divide(spent, (cursor, attempt.end), [("checkpointing", saving)], rest=rest)
    return index


def _blocked(at: float, row: CheckpointRow, total_steps: int) -> Span:
    """The time for which a checkpoint kept its ranks from going on: all of it where it was the last
    one."""
    begin = at - row.seconds
    return begin, at if row.step >= total_steps else begin + row.blocking_s


def _divide(
    spent: Spent, span: Span, claims: Sequence[tuple[Part, NDArray[np.float64]]], *, rest: Part
) -> None:
    """Give each part what it claims of a span, the first claim first; claims are [N, 2] of begin
    and end."""
    free = [span]
    for part, spans_N2 in claims:
        near_N = (spans_N2[:, 0] < span[1]) & (spans_N2[:, 1] > span[0])
        for begin, end in spans_N2[near_N].tolist():
            spent[part] += sum(max(min(b, end) - max(a, begin), 0.0) for a, b in free)
            free = [piece for whole in free for piece in _without(whole, (begin, end))]
    spent[rest] += sum(end - begin for begin, end in free)


def _without(span: Span, hole: Span) -> Iterator[Span]:
    begin, end = span
    if hole[0] >= end or hole[1] <= begin:
        yield span
        return
    if begin < hole[0]:
        yield begin, hole[0]
    if hole[1] < end:
        yield hole[1], end


def _spans(spans: Iterable[Span]) -> NDArray[np.float64]:
    return np.array(list(spans), np.float64).reshape(-1, 2)


def teacher_time(summary: Summary) -> TimeSpent | None:
    """Of as many teachers as each attempt asked for; those that never came were idle (`other`).
    None where no teacher was at work."""
    attempts = _attempts(summary)
    made = [row for attempt in attempts for _, row in attempt.rows if isinstance(row, ChunkRow)]
    if not any(
        isinstance(row, TeacherRow | ChunkRow) for attempt in attempts for _, row in attempt.rows
    ):
        return None
    useful = {id(row) for row in {row.chunk: row for row in made if not row.duplicate}.values()}
    spent: Spent = dict.fromkeys(PARTS, 0.0)
    for attempt in attempts:
        _spend_teachers(attempt, spent, useful)
    return TimeSpent(spent)


def _spend_teachers(attempt: _Attempt, spent: Spent, useful: set[int]) -> None:
    num_teachers = attempt.start.num_teachers
    busy: dict[Part, list[Span]] = {"useful": [], "redone": [], "starting": [], "restarting": []}
    num_ready = 0
    done_at = attempt.begin
    for at, row in attempt.rows:
        if isinstance(row, ChunkRow):
            busy["useful" if id(row) in useful else "redone"].append((at - row.seconds, at))
            done_at = at
        elif isinstance(row, TeacherRow):
            num_ready += 1
            is_first = num_ready <= num_teachers
            begin = attempt.begin if is_first else at - row.seconds_to_ready
            busy["starting" if is_first and attempt.number == 0 else "restarting"].append(
                (begin, at)
            )
            done_at = at
    if not any(isinstance(row, PoolRow) and row.published >= row.needed for _, row in attempt.rows):
        done_at = attempt.end
    held = _held_back(attempt)
    edges = np.unique(
        [
            attempt.begin,
            done_at,
            attempt.end,
            *_bounds(busy.values(), attempt),
            *(each.end for each in held),
        ]
    )
    length = np.diff(edges)
    counts = {part: _covering(spans, edges) for part, spans in busy.items()}
    at_work = np.sum(list(counts.values()), axis=0)
    # a lost teacher and its successor may overlap
    scale = np.minimum(1.0, num_teachers / np.maximum(at_work, 1))
    for part, count in counts.items():
        spent[part] += float(np.sum(length * count * scale))
    idle_s = length * np.maximum(num_teachers - at_work, 0)
    released = edges[:-1] >= done_at
    spent["released"] += float(np.sum(idle_s[released]))
    share = np.zeros(len(length))
    for each in held:
        first, last = np.searchsorted(edges, (each.begin, each.end))
        share[first:last] = min(each.amount / (each.end - each.begin), 1.0)
    waiting_s = (idle_s * share)[~released]
    spent["waiting"] += float(np.sum(waiting_s))
    spent["other"] += float(np.sum(idle_s[~released]) - np.sum(waiting_s))


def _held_back(attempt: _Attempt) -> list[Interval]:
    """Seconds in which the window held the teachers back, between each two looks at the pool."""
    looks = [(attempt.begin, 0.0)] + [
        (at, row.window_wait_s) for at, row in attempt.rows if isinstance(row, PoolRow)
    ]
    return [
        Interval(begin, end, max(after - before, 0.0))
        for (begin, before), (end, after) in pairwise(looks)
        if end > begin
    ]


def _bounds(groups: Iterable[Sequence[Span]], attempt: _Attempt) -> Iterator[float]:
    for spans in groups:
        for span in spans:
            yield from (min(max(bound, attempt.begin), attempt.end) for bound in span)


def _covering(spans: Sequence[Span], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many of the spans cover each stretch between two neighbouring edges."""
    change = np.zeros(len(edges))
    for begin, end in spans:
        change[np.searchsorted(edges, max(begin, edges[0]))] += 1
        change[np.searchsorted(edges, min(end, edges[-1]))] -= 1
    return np.cumsum(change)[:-1]


def recoveries(summary: Summary) -> list[Recovery]:
    """Every time that training stood still because ranks, or the whole run, had gone, in order."""
    found = [
        Recovery(at, row.role, row.cause, row.seconds, row.lost_steps, row.detail)
        for at, row in summary.timeline
        if isinstance(row, RecoveryRow)
    ]
    attempts = _attempts(summary)
    for earlier, later in pairwise(attempts):
        steps = later.train_rows()
        if not steps:
            continue
        at, first = steps[0]
        reached = max(
            (row.step for row in _steps(attempts[: later.number]) if row.role == first.role),
            default=0,
        )
        cause = earlier.outcome or "killed"
        detail = f"attempt {later.number + 1} goes on"
        found.append(
            Recovery(at, "run", cause, at - later.begin, max(reached - first.step + 1, 0), detail)
        )
    return sorted(found, key=lambda recovery: recovery.at)


def incidents(summary: Summary) -> list[str]:
    """What else befell the run, in words: empty where nothing did."""
    rows = [row for _, row in summary.timeline]
    pools = [
        [row for _, row in attempt.rows if isinstance(row, PoolRow)]
        for attempt in _attempts(summary)
    ]
    last = [each[-1] for each in pools if each]
    counts = [
        (sum(row.losses for row in last), "lease", "lost with a teacher"),
        (
            sum(row.hedged for row in last),
            "chunk",
            "given to a second teacher because the first was slow",
        ),
        (sum(isinstance(row, ChunkRow) and row.duplicate for row in rows), "chunk", "made twice"),
        (sum(isinstance(row, RepairRow) for row in rows), "damaged chunk", "made anew"),
        (
            sum(len(row.sequences) for row in rows if isinstance(row, SetAsideRow)),
            "sequence",
            "set aside",
        ),
        (
            len({(row.role, row.step) for row in rows if isinstance(row, DelayRow)}),
            "checkpoint",
            "that the store did not take at once",
        ),
        (
            sum(isinstance(row, OutageRow) for row in rows),
            "long wait",
            "for a store that was unavailable",
        ),
        (sum(isinstance(row, NoticeRow) for row in rows), "notice", "of a machine's end"),
        (
            sum(isinstance(row, StallRow) and row.role != "teacher" for row in rows),
            "stalled rank",
            "found by the watchdog",
        ),
        (
            sum(isinstance(row, StallRow) and row.role == "teacher" for row in rows),
            "silent teacher",
            "killed and replaced",
        ),
    ]
    return [
        f"{count:,} {thing}{'s' if count > 1 else ''} {what}"
        for count, thing, what in counts
        if count
    ]


def _attempts(summary: Summary) -> list[_Attempt]:
    begins = [index for index, (_, row) in enumerate(summary.timeline) if isinstance(row, StartRow)]
    pieces = [
        summary.timeline[begin:end] for begin, end in pairwise([*begins, len(summary.timeline)])
    ]
    ends = [*(piece[0][0] for piece in pieces[1:]), summary.run_s]
    return [
        _Attempt(number, piece[0][0], end, piece)
        for number, (piece, end) in enumerate(zip(pieces, ends, strict=True))
    ]


def _steps(attempts: Sequence[_Attempt]) -> list[TrainRow]:
    return [row for attempt in attempts for _, row in attempt.train_rows()]
