"""Goodput: where the time of students and teachers went, from the journal's events alone.

Invariant: each moment of a side's time is in one part, so the parts add up: to the run's time for
the students, whose ranks step together, and to the run's time for each teacher that was asked for.

Times are seconds on the run's own clock, which stands still between attempts. A span is a pair of
them, begin and end.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from stillhouse.report.summary import Interval, Summary, Timeline, of_kind
from stillhouse.report.words import counted
from stillhouse.tracking import (
    CheckpointEvent,
    ChunkEvent,
    DelayEvent,
    EarlyStopEvent,
    EndEvent,
    HeldoutEvent,
    NoticeEvent,
    OutageEvent,
    PoolEvent,
    RecoveryEvent,
    RepairEvent,
    Role,
    SetAsideEvent,
    StallEvent,
    StartEvent,
    TeacherEvent,
    TrainEvent,
)

Part = Literal[
    "useful",
    "waiting",
    "scoring",  # held-out text, while a student learns
    "checkpointing",
    "starting",
    "restarting",
    "redone",
    "other",
    "released",
]
PARTS: tuple[Part, ...] = get_args(Part)
Span = tuple[float, float]
Spent = dict[Part, float]
_Claim = tuple[Part, NDArray[np.float64]]  # a part, and the spans that it took: [N, 2]


@dataclass(frozen=True, slots=True)
class TimeSpent:
    """The time of one side, by part: the students' or the teachers'.

    Students wait for chunks, teachers for the window to move on.
    """

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
    """A time for which training stood still because ranks, or the whole run, had gone."""

    at: float  # when training went on
    whose: str  # student, control, or run
    cause: str
    seconds: float
    lost_steps: int  # that were taken again
    detail: str


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The events from one StartEvent up to the next."""

    number: int  # from 0
    begin: float
    end: float
    events: Timeline

    @property
    def start(self) -> StartEvent:
        first = self.events[0][1]
        assert isinstance(first, StartEvent)
        return first

    @property
    def outcome(self) -> str | None:
        """How it ended; None where it was killed, or goes on."""
        return next((end.outcome for _, end in of_kind(self.events, EndEvent)), None)

    def last_step(self, role: Role) -> int:
        """The step with which a role was to end, or stopped early."""
        stops = of_kind(self.events, EarlyStopEvent)
        return next((stop.step for _, stop in stops if stop.role == role), self.start.total_steps)

    def steps(self) -> list[tuple[float, TrainEvent]]:
        return of_kind(self.events, TrainEvent)


# ---- Students


def student_time(summary: Summary) -> TimeSpent | None:
    """Where the students' time went; None where no step was taken."""
    attempts = _attempts(summary)
    counts_at = {(step.role, step.step): index for index, step in enumerate(_steps(attempts))}
    if not counts_at:
        return None
    spent: Spent = dict.fromkeys(PARTS, 0.0)
    index = 0
    for attempt in attempts:
        index = _spend_attempt(attempt, spent, counts_at, index)
    return TimeSpent(spent)


def _spend_attempt(
    attempt: _Attempt, spent: Spent, counts_at: Mapping[tuple[Role, int], int], index: int
) -> int:
    """Add an attempt's time to `spent`, and return `index` behind its last step.

    `index` counts the steps of all attempts. `counts_at` has the index at which each step was taken
    for the last time: only then it was useful; the times before, it was redone.
    """
    # What may be in the gaps between steps: a claim for each part, the first one first.
    last_step = {role: attempt.last_step(role) for role in get_args(Role)}
    commits = of_kind(attempt.events, CheckpointEvent)
    scores = of_kind(attempt.events, HeldoutEvent)
    recovered = of_kind(attempt.events, RecoveryEvent)
    scoring: _Claim = "scoring", _spans((at - each.seconds, at) for at, each in scores)
    saving: _Claim = (
        "checkpointing",
        _spans(_blocked(at, each, last_step[each.role]) for at, each in commits),
    )
    standing: _Claim = "restarting", _spans((at - each.seconds, at) for at, each in recovered)
    first_start: Part = "starting" if attempt.number == 0 else "restarting"
    cursor, before = attempt.begin, None
    for at, step in attempt.steps():
        # The gap before the step: a start, another role's start, a restart, or a commit.
        gap = cursor, max(at - step.seconds, cursor)
        if before is None:
            _divide(spent, gap, [scoring], rest=first_start)
        elif step.role != before.role:
            _divide(spent, gap, [scoring, saving], rest="starting")
        elif step.step != before.step + 1:
            _divide(spent, gap, [scoring], rest="restarting")
        else:
            _divide(spent, gap, [scoring, standing, saving], rest="other")

        # The step itself.
        cursor = max(at, gap[1])
        step_s = cursor - gap[1]
        if counts_at[step.role, step.step] == index:
            waited_s = min(step.data_wait_s, step_s)
            spent["waiting"] += waited_s
            spent["useful"] += step_s - waited_s
        else:
            spent["redone"] += step_s
        before, index = step, index + 1

    # The time behind the last step.
    if before is None:
        only: Part = "released" if attempt.outcome == "done" else first_start
        _divide(spent, (cursor, attempt.end), [scoring], rest=only)
    else:
        rest: Part = "released" if before.step >= last_step[before.role] else "other"
        _divide(spent, (cursor, attempt.end), [scoring, saving], rest=rest)
    return index


def _blocked(at: float, commit: CheckpointEvent, last_step: int) -> Span:
    """The span in which a checkpoint kept its ranks from going on: all of it where it was the last
    one."""
    begin = at - commit.seconds
    return begin, at if commit.step >= last_step else begin + commit.blocking_s


def _divide(spent: Spent, span: Span, claims: Sequence[_Claim], *, rest: Part) -> None:
    """Give each part what it claims of a span, the first claim first, and `rest` what is left.

    A claim's spans are [N, 2], begin and end.
    """
    free = [span]
    for part, spans_N2 in claims:
        near_N = (spans_N2[:, 0] < span[1]) & (spans_N2[:, 1] > span[0])
        for begin, end in spans_N2[near_N].tolist():
            spent[part] += sum(max(min(b, end) - max(a, begin), 0.0) for a, b in free)
            free = [piece for whole in free for piece in _without(whole, (begin, end))]
    spent[rest] += sum(end - begin for begin, end in free)


def _without(span: Span, hole: Span) -> Iterator[Span]:
    """What is left of a span on both sides of a hole."""
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


# ---- Teachers


def teacher_time(summary: Summary) -> TimeSpent | None:
    """Where the teachers' time went; None where no teacher was at work.

    Counted for as many teachers as each attempt asked for; one that never came was idle (`other`).
    """
    made = [chunk for _, chunk in of_kind(summary.timeline, ChunkEvent)]
    if not made and not of_kind(summary.timeline, TeacherEvent):
        return None
    last_made = {chunk.chunk: chunk for chunk in made if not chunk.duplicate}
    useful = {id(chunk) for chunk in last_made.values()}
    spent: Spent = dict.fromkeys(PARTS, 0.0)
    for attempt in _attempts(summary):
        _spend_teachers(attempt, spent, useful)
    return TimeSpent(spent)


def _spend_teachers(attempt: _Attempt, spent: Spent, useful: set[int]) -> None:
    """Add an attempt's time, of each of its teachers, to `spent`; `useful` are the ids of the
    ChunkEvent objects that count."""
    num_teachers = attempt.start.num_teachers

    # What teachers were doing, and when the last of them had done its work.
    busy: dict[Part, list[Span]] = {"useful": [], "redone": [], "starting": [], "restarting": []}
    num_ready = 0
    done_at = attempt.begin
    for at, event in attempt.events:
        if isinstance(event, ChunkEvent):
            busy["useful" if id(event) in useful else "redone"].append((at - event.seconds, at))
            done_at = at
        elif isinstance(event, TeacherEvent):
            num_ready += 1
            is_first = num_ready <= num_teachers
            begin = attempt.begin if is_first else at - event.seconds_to_ready
            part: Part = "starting" if is_first and attempt.number == 0 else "restarting"
            busy[part].append((begin, at))
            done_at = at
    pools = of_kind(attempt.events, PoolEvent)
    if not any(pool.published >= pool.needed for _, pool in pools):
        done_at = attempt.end

    # The stretches between two moments at which any of that changes.
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

    # In each stretch: teachers at work, and of the idle ones those that the window held back.
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
    looks = [
        (attempt.begin, 0.0),
        *((at, pool.window_wait_s) for at, pool in of_kind(attempt.events, PoolEvent)),
    ]
    return [
        Interval(begin, end, max(after - before, 0.0))
        for (begin, before), (end, after) in pairwise(looks)
        if end > begin
    ]


def _bounds(groups: Iterable[Sequence[Span]], attempt: _Attempt) -> Iterator[float]:
    """Both ends of every span, within the attempt."""
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


# ---- Recoveries and incidents


def recoveries(summary: Summary) -> list[Recovery]:
    """Every recovery of ranks, and every attempt that went on from another one, in order."""
    found = [
        Recovery(at, each.role, each.cause, each.seconds, each.lost_steps, each.detail)
        for at, each in of_kind(summary.timeline, RecoveryEvent)
    ]
    attempts = _attempts(summary)
    for earlier, later in pairwise(attempts):
        if not (steps := later.steps()):
            continue
        at, first = steps[0]
        before = _steps(attempts[: later.number])
        reached = max((step.step for step in before if step.role == first.role), default=0)
        cause = earlier.outcome or "killed"
        detail = f"attempt {later.number + 1} goes on"
        found.append(
            Recovery(at, "run", cause, at - later.begin, max(reached - first.step + 1, 0), detail)
        )
    return sorted(found, key=lambda recovery: recovery.at)


def incidents(summary: Summary) -> list[str]:
    """What else went wrong and was repaired, in words; empty where nothing did."""
    # The events of each kind.
    timeline = summary.timeline
    pools = [of_kind(attempt.events, PoolEvent) for attempt in _attempts(summary)]
    last_pools = [each[-1][1] for each in pools if each]
    chunks_set_aside = [event for _, event in of_kind(timeline, SetAsideEvent)]
    delayed = {(delay.role, delay.step) for _, delay in of_kind(timeline, DelayEvent)}
    silent = [stall.role == "teacher" for _, stall in of_kind(timeline, StallEvent)]

    # How many, of what, and what became of it.
    counts = [
        (sum(pool.losses for pool in last_pools), "lease", "lost with a teacher"),
        (
            sum(pool.hedged for pool in last_pools),
            "chunk",
            "given to a second teacher because the first was slow",
        ),
        (sum(chunk.duplicate for _, chunk in of_kind(timeline, ChunkEvent)), "chunk", "made twice"),
        (len(of_kind(timeline, RepairEvent)), "damaged chunk", "made anew"),
        (sum(len(event.sequences) for event in chunks_set_aside), "sequence", "set aside"),
        (len(delayed), "checkpoint", "that the store did not take at once"),
        (len(of_kind(timeline, OutageEvent)), "long wait", "for a store that was unavailable"),
        (len(of_kind(timeline, NoticeEvent)), "notice", "of a machine's end"),
        (silent.count(False), "stalled rank", "found by the watchdog"),
        (silent.count(True), "silent teacher", "killed and replaced"),
    ]
    return [f"{counted(count, thing)} {what}" for count, thing, what in counts if count]


def _attempts(summary: Summary) -> list[_Attempt]:
    """The run's attempts, each up to where the next one begins."""
    timeline = summary.timeline
    begins = [index for index, (_, event) in enumerate(timeline) if isinstance(event, StartEvent)]
    pieces = [timeline[begin:end] for begin, end in pairwise([*begins, len(timeline)])]
    ends = [*(piece[0][0] for piece in pieces[1:]), summary.run_s]
    return [
        _Attempt(number, piece[0][0], end, piece)
        for number, (piece, end) in enumerate(zip(pieces, ends, strict=True))
    ]


def _steps(attempts: Sequence[_Attempt]) -> list[TrainEvent]:
    return [step for attempt in attempts for _, step in attempt.steps()]
