"""The board: one small actor through which students answer the teacher pool and the driver. No tensor passes through it.

What is pinned to it: how far readers are, which chunks they found damaged, which machines announced their end, and every rank's signs of
life. What is lost with its process is told to it again, or was news only. It lives beside the driver, so it also writes down what ranks on
other machines have to say: the run directory need not be shared.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import time
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stillhouse.errors import StillhouseError, StoreError
from stillhouse.notices import Notice
from stillhouse.redaction import scrub
from stillhouse.shell import learn_secrets
from stillhouse.tracking import Journal, Row, scrubbed

Phase = Literal["start", "data", "step", "snapshot", "commit"]  # loading, awaiting chunks, computing, copying its state, awaiting the store
Cause = Literal["died", "stalled", "notice", "grown", "stop"]


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank's sign of life."""

    group: str  # the role that it trains
    rank: int
    node: str  # Ray's node id
    pid: int
    step: int  # that it is in, counted from 1
    phase: Phase
    phase_s: float  # seconds since it entered the phase
    stack: str = ""  # of its threads, once the phase lasts too long


@dataclass(frozen=True, slots=True)
class Heard:
    """A sign of life, and how long ago it came, by the board's clock."""

    beat: Beat
    ago_s: float


@dataclass(frozen=True, slots=True)
class Summons:
    """A group is asked to commit what it has and to leave: on notice, to come back larger, or for good (stop)."""

    cause: Cause
    deadline: float  # unix seconds
    detail: str


@dataclass(frozen=True, slots=True)
class Past:
    """How a group's life before this one ended."""

    cause: Cause
    detail: str
    last_step: int  # taken before the end
    last_time: float  # unix seconds, of that step
    num_failures: int  # lives in a row that were lost without a new commit, this one's predecessor included


@dataclass(frozen=True, slots=True)
class News:
    """What has come in for the teacher pool."""

    cursors: Mapping[str, int]  # reader -> chunks at the front of the reading order that it will never need again
    bad_chunks: frozenset[int]  # reported since the last look
    notices: Mapping[str, Notice]  # node id -> the end that it announced


class _Board:
    def __init__(self, journal: Path | None) -> None:
        learn_secrets()
        self._journal = None if journal is None else Journal(journal)
        self._cursors: dict[str, int] = {}
        self._bad_chunks: set[int] = set()
        self._notices: dict[str, Notice] = {}
        self._groups: dict[str, _Group] = {}
        self._verdict: StillhouseError | None = None

    def record(self, row: Row) -> None:
        assert self._journal is not None
        self._journal.record(row)

    def mention(self, row: Row) -> None:
        if self._journal is not None:
            with suppress(StoreError):
                self._journal.record(row)

    def move_cursor(self, reader: str, num_chunks: int) -> None:
        self._cursors[reader] = num_chunks

    def report_bad_chunk(self, number: int) -> None:
        self._bad_chunks.add(number)

    def announce(self, node: str, notice: Notice) -> None:
        self._notices.setdefault(node, notice)

    def notices(self) -> dict[str, Notice]:
        return dict(self._notices)

    def read(self) -> News:
        bad_chunks, self._bad_chunks = self._bad_chunks, set()
        return News(dict(self._cursors), frozenset(bad_chunks), dict(self._notices))

    def begin(self, group: str, committed_step: int) -> Past | None:
        return self._groups.setdefault(group, _Group()).begin(committed_step)

    def stepped(self, group: str, step: int) -> None:
        self._groups.setdefault(group, _Group()).stepped(step)

    def beat(self, beat: Beat) -> Summons | None:
        group = self._groups.setdefault(beat.group, _Group())
        group.beats[beat.rank] = (beat, time())
        return group.summons or _summons_of(self._notices, [heard.node for heard, _ in group.beats.values()])

    def heard(self, group: str) -> list[Heard]:
        now = time()
        beats = self._groups[group].beats.values() if group in self._groups else ()
        return [Heard(beat, now - at) for beat, at in beats]

    def forget(self, group: str, rank: int | None) -> None:
        beats = self._groups[group].beats if group in self._groups else {}
        for each in list(beats) if rank is None else [rank]:
            beats.pop(each, None)

    def summon(self, group: str, summons: Summons) -> None:
        self._groups.setdefault(group, _Group()).summons = summons

    def explain(self, group: str, cause: Cause, detail: str) -> None:
        self._groups.setdefault(group, _Group()).explain(cause, detail)

    def departure(self) -> Cause | None:
        return next((group.departure for group in self._groups.values() if group.departure is not None), None)

    def give_up(self, error: StillhouseError) -> None:
        self._verdict = self._verdict or error

    def verdict(self) -> StillhouseError | None:
        return self._verdict


class _Group:
    """The lives of one group of ranks, from loss to loss."""

    def __init__(self) -> None:
        self.beats: dict[int, tuple[Beat, float]] = {}
        self.summons: Summons | None = None
        self._why: tuple[Cause, str] | None = None
        self._last: tuple[int, float] = (0, time())
        self._begun_from: int | None = None
        self._num_failures = 0

    def stepped(self, step: int) -> None:
        self._last = (step, time())

    def explain(self, cause: Cause, detail: str) -> None:
        if self._why is None:  # ranks that fail because another did have nothing to add
            self._why = (cause, detail)

    @property
    def departure(self) -> Cause | None:
        cause = self._why[0] if self._why is not None else None
        return cause if cause in ("notice", "grown", "stop") else None

    def begin(self, committed_step: int) -> Past | None:
        before, self._begun_from = self._begun_from, committed_step
        (cause, detail), self._why = self._why or ("died", "a rank was killed, or its machine"), None
        self.beats.clear()
        if self.summons is not None and self.summons.cause != "stop":
            self.summons = None
        if before is None:
            self.stepped(committed_step)
            return None
        if committed_step > before or cause in ("notice", "grown"):
            self._num_failures = 0
        self._num_failures += cause in ("died", "stalled")
        return Past(cause, detail, *self._last, self._num_failures)


def _summons_of(notices: Mapping[str, Notice], nodes: list[str]) -> Summons | None:
    """The first end that one of the group's machines announced."""
    ours = [notices[node] for node in nodes if node in notices]
    first = min(ours, key=lambda notice: notice.deadline, default=None)
    return None if first is None else Summons("notice", first.deadline, f"{first.source}: {first.detail}")


@dataclass(frozen=True, slots=True)
class Board:
    """A handle to the board; it can be passed to any process.

    The actor lives on the node of the process that made it, the driver: on another it might be taken away from a run that goes on.
    """

    _actor: Any

    @classmethod
    def create(cls, journal: Path | None = None) -> "Board":
        """A board that writes rows down in this journal, a file of the driver's machine; without one it takes no rows."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        return cls(ray.remote(_Board).options(**options).remote(None if journal is None else journal.resolve()))

    def record(self, row: Row) -> None:
        """As a Tracker: returns when the row is on the driver's disk. Raises StoreError where it cannot be written.

        This process's secrets stay in it: the board does not know them.
        """
        try:
            ray.get(self._actor.record.remote(scrubbed(row if row.time else replace(row, time=time()))))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, StillhouseError) else error) from None

    def mention(self, row: Row) -> None:
        """Have a row written down where there is a journal that can be written. Returns at once; nobody hears of a failure."""
        self._actor.mention.remote(row if row.time else replace(row, time=time()))

    def move_cursor(self, reader: str, num_chunks: int) -> None:
        """`reader` will never again need the first `num_chunks` chunks of the reading order. Returns at once."""
        self._actor.move_cursor.remote(reader, num_chunks)

    def report_bad_chunk(self, number: int) -> None:
        """A reader found chunk `number` damaged. Returns at once."""
        self._actor.report_bad_chunk.remote(number)

    def announce(self, node: str, notice: Notice) -> None:
        """The machine of Ray's node `node` will be taken away. Returns at once; the first to say so is believed."""
        self._actor.announce.remote(node, notice)

    def notices(self) -> dict[str, Notice]:
        """Every notice so far, by node id."""
        return ray.get(self._actor.notices.remote())

    def read(self) -> News:
        """For the teacher pool, which alone reads: what has come in."""
        return ray.get(self._actor.read.remote())

    def begin(self, group: str, *, committed_step: int) -> Past | None:
        """A group begins, from this commit; None where it is the first time on this board. One rank calls this."""
        return ray.get(self._actor.begin.remote(group, committed_step))

    def stepped(self, group: str, step: int) -> None:
        """The group has taken its `step`-th step. Returns at once."""
        self._actor.stepped.remote(group, step)

    def beat(self, beat: Beat) -> Summons | None:
        """Give a sign of life; what comes back asks the whole group to leave."""
        return ray.get(self._actor.beat.remote(beat))

    def heard(self, group: str) -> list[Heard]:
        """The last sign of life of each rank of a group."""
        return ray.get(self._actor.heard.remote(group))

    def forget(self, group: str, *, rank: int | None = None) -> None:
        """This rank of a group is done, or all of them are gone: silence means nothing from now on."""
        ray.get(self._actor.forget.remote(group, rank))

    def summon(self, group: str, summons: Summons) -> None:
        """Ask a group to commit and leave; what it is asked last counts."""
        ray.get(self._actor.summon.remote(group, summons))

    def explain(self, group: str, cause: Cause, detail: str) -> None:
        """Say why a group is about to end; the first to say so is believed."""
        ray.get(self._actor.explain.remote(group, cause, scrub(detail)))

    def departure(self) -> Cause | None:
        """Why the group that was last at work left on a summons; None where none did."""
        return ray.get(self._actor.departure.remote())

    def give_up(self, error: StillhouseError) -> None:
        """Training failed in a way that would only come again; the first error stands."""
        ray.get(self._actor.give_up.remote(error))

    def verdict(self) -> StillhouseError | None:
        """Why training was given up; None where it was not."""
        return ray.get(self._actor.verdict.remote())
