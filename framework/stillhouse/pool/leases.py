"""Which chunk is made next, and by which teacher: a pure state machine over chunk numbers, without Ray and without a clock.

Every wanted chunk is open or settled (published, or needed by nobody). Open ones are leased in the order in which the students first read
them, within a window of that order, to one teacher each; a second one only where the first is late or slow. Whatever becomes of leases,
teachers and clocks, an open chunk can always be leased again, and a chunk that no teacher can make is taken apart into its sequences.

What it remembers grows with the leases that are out, not with the corpus, of which it keeps one byte a chunk.
"""

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import TeacherError

_WEIGHT_OF_A_RAISE, _WEIGHT_OF_A_DEATH = 3, 1  # a lost machine is seldom the chunk's fault
_SLOW = 2.0  # times the usual duration, after which an idle teacher gets the chunk too
_REMEMBERED_DURATIONS = 63
_WHOLE = -1


class Work(NamedTuple):
    """A chunk, by its position in the reading order; or one row of it, on trial."""

    position: int
    row: int = _WHOLE


@dataclass(frozen=True, slots=True)
class Lease:
    """A piece of work in the hands of one teacher, until `deadline`."""

    id: int
    work: Work
    chunk: int
    left_out: frozenset[int]  # rows of the chunk that are set aside
    holder: int
    began: float
    deadline: float

    @property
    def trial(self) -> int | None:
        """The row that is computed alone, to see whether it can be; nothing of it is published. None: the chunk is made."""
        return None if self.work.row == _WHOLE else self.work.row


@dataclass(frozen=True, slots=True)
class SetAside:
    """Rows of a chunk that no teacher could compute."""

    chunk: int
    rows: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Budget:
    """What is tried before something is given up. A death counts a third of an attempt that raised."""

    max_failures: int  # attempts at one chunk, and then at one of its rows
    max_set_aside: int  # rows, of all chunks together
    timeout_s: float  # for one lease

    @property
    def weight(self) -> int:
        return _WEIGHT_OF_A_RAISE * self.max_failures


@dataclass(slots=True)
class _Examination:
    """A chunk that failed too often is not leased; its rows are, one by one."""

    undecided: set[int]
    condemned: list[int]
    reason: str


class LeaseTable:
    """`order` names the wanted chunks in reading order, `settled` which positions of it need no work, `num_rows` how long a chunk is."""

    def __init__(
        self, order: Sequence[int] | NDArray[np.int64], *, settled: NDArray[np.bool_], num_rows: Callable[[int], int], budget: Budget
    ):
        self._order = np.asarray(order, dtype=np.int64)
        self._settled = bytearray(settled.astype(np.uint8).tobytes())
        self._num_settled = int(settled.sum())
        self._num_rows, self._budget = num_rows, budget
        self._frontier = 0  # no position from here on has ever been leased
        self._returned: list[tuple[int, int, int]] = []  # a heap of (position, weight against it, row); the set says which still hold
        self._waiting: set[Work] = set()
        self._next_id = 0
        self._active: dict[int, Lease] = {}  # by id, so by age
        self._late: dict[int, Lease] = {}  # given back, but with a teacher still
        self._held: dict[Work, list[Lease]] = {}
        self._alone: OrderedDict[Work, Lease] = OrderedDict()  # held by one teacher, the longest first
        self._durations: deque[float] = deque(maxlen=_REMEMBERED_DURATIONS)
        self._against: Counter[Work] = Counter()
        self._examinations: dict[int, _Examination] = {}
        self._left_out: dict[int, frozenset[int]] = {}  # of the positions that were examined
        self._void_before: dict[int, int] = {}  # position -> leases with a lower id tell nothing about it: it was damaged since
        self.num_failures = self.num_losses = self.num_late = self.num_hedged = self.num_set_aside = 0

    @property
    def num_wanted(self) -> int:
        return len(self._order)

    @property
    def num_settled(self) -> int:
        return self._num_settled

    @property
    def num_leased(self) -> int:
        """Pieces of work that a teacher holds and that are still wanted."""
        return len(self._held)

    @property
    def num_out(self) -> int:
        """Leases that teachers have not answered, late ones included."""
        return len(self._active) + len(self._late)

    @property
    def done(self) -> bool:
        return self._num_settled == len(self._order)

    def held_back(self, *, limit: int) -> bool:
        """Whether work is waiting that only the window keeps from being leased."""
        work = self._next()
        return work is not None and work.position >= limit

    def lease(self, holder: int, *, limit: int, now: float) -> Lease | None:
        """The next work whose position in the reading order is below `limit`, now leased; None where there is none to give."""
        work = self._next()
        if work is None or work.position >= limit:
            return None
        if work in self._waiting:
            self._waiting.remove(work)
            heapq.heappop(self._returned)
        else:
            self._frontier = work.position + 1
        return self._grant(work, holder, now)

    def hedge(self, holder: int, *, now: float) -> Lease | None:
        """The longest-running work of another teacher, if it takes far longer than usual and nobody else was given it too."""
        if not self._alone or not self._durations:
            return None
        slow_s = _SLOW * sorted(self._durations)[len(self._durations) // 2]
        for work, first in self._alone.items():
            if now - first.began <= slow_s:
                return None
            if first.holder != holder:
                self.num_hedged += 1
                return self._grant(work, holder, now)
        return None

    def expire(self, now: float) -> list[Lease]:
        """The leases whose deadline has come, now given back. Their holders may still answer."""
        expired = []
        while self._active and (oldest := next(iter(self._active.values()))).deadline <= now:
            self.num_late += self._is_open(oldest.work)
            self._end(oldest)
            self._late[oldest.id] = oldest
            expired.append(oldest)
        return expired

    def publish(self, lease: Lease, *, now: float) -> None:
        """Its holder put the chunk into the store, or lost the race for it. A late answer is as good as any."""
        self._durations.append(now - lease.began)
        self.find(lease)

    def find(self, lease: Lease) -> None:
        """Its holder found the chunk in the store, and had nothing to do."""
        self._take(lease)
        position = lease.work.position
        if self._settled[position] or lease.id < self._void_before.get(position, 0):
            self._let_go(lease)
            return
        self._settled[position] = 1
        self._num_settled += 1
        self._forget(Work(position))
        if self._examinations.pop(position, None) is not None:
            for row in range(self._num_rows(lease.chunk)):
                self._forget(Work(position, row))

    def passed(self, lease: Lease) -> SetAside | None:
        """The row on trial could be computed. Returns what is set aside, where this was the last row in doubt."""
        self._take(lease)
        if not self._is_open(lease.work):
            return None
        self._examinations[lease.work.position].undecided.remove(lease.work.row)
        self._forget(lease.work)
        return self._conclude(lease.work.position)

    def give_back(self, lease: Lease) -> None:
        """The lease ended because its holder was sent away, or never began it."""
        self._end(lease)

    def lose(self, lease: Lease, reason: str, *, blame: bool = True) -> SetAside | None:
        """The lease ended because its teacher died at it. Raises TeacherError and returns as `fail` does, after three times as many.

        Without `blame` it says nothing about the work: the machine was taken away.
        """
        self.num_losses += 1
        if not blame:
            self._end(lease)
            return None
        return self._accuse(lease, _WEIGHT_OF_A_DEATH, reason)

    def fail(self, lease: Lease, reason: str) -> SetAside | None:
        """An attempt raised. After `max_failures` of them a chunk is examined row by row, and a row set aside.

        Returns what is set aside, once that is known of every row. Raises TeacherError where rows alone cannot explain it.
        """
        self.num_failures += 1
        return self._accuse(lease, _WEIGHT_OF_A_RAISE, reason)

    def reopen(self, *numbers: int) -> int:
        """These chunks are not in the store any more and have to be made again; how many are, for the others are not wanted, or open."""
        settled = np.frombuffer(bytes(self._settled), dtype=bool)
        positions = np.flatnonzero(np.isin(self._order, numbers) & settled).tolist()
        for position in positions:
            self._settled[position] = 0
            self._void_before[position] = self._next_id
            if position < self._frontier:
                self._push(Work(position))
        self._num_settled -= len(positions)
        return len(positions)

    def clear(self) -> None:
        """Every teacher was sent away: all leases are given back."""
        for lease in [*self._active.values(), *self._late.values()]:
            self._end(lease)

    def _next(self) -> Work | None:
        while self._returned and Work(self._returned[0][0], self._returned[0][2]) not in self._waiting:
            heapq.heappop(self._returned)
        self._frontier = self._settled.find(0, self._frontier) % (len(self._order) + 1)  # -1, for none, becomes the end
        if self._returned and self._returned[0][0] < self._frontier:
            return Work(self._returned[0][0], self._returned[0][2])
        return Work(self._frontier) if self._frontier < len(self._order) else None

    def _grant(self, work: Work, holder: int, now: float) -> Lease:
        chunk, left_out = int(self._order[work.position]), self._left_out.get(work.position, frozenset())
        lease = Lease(self._next_id, work, chunk, left_out, holder, now, now + self._budget.timeout_s)
        self._next_id += 1
        self._active[lease.id] = lease
        self._held.setdefault(work, []).append(lease)
        self._watch(work)
        return lease

    def _end(self, lease: Lease) -> None:
        self._take(lease)
        self._let_go(lease)

    def _take(self, lease: Lease) -> None:
        """The holder has the lease no more. Raises KeyError where it never had."""
        if self._late.pop(lease.id, None) is None:
            del self._active[lease.id]

    def _let_go(self, lease: Lease) -> None:
        """Work that is wanted and that nobody else holds waits again."""
        holders = self._held.get(lease.work, [])
        if lease not in holders:
            return
        holders.remove(lease)
        self._watch(lease.work)
        if not holders:
            del self._held[lease.work]
            self._push(lease.work)

    def _watch(self, work: Work) -> None:
        """Keep the book of works that a single teacher holds."""
        self._alone.pop(work, None)
        if len(self._held[work]) == 1:
            self._alone[work] = lease = self._held[work][0]
            if lease.id < self._next_id - 1:  # alone again, and older than most
                self._alone.move_to_end(work, last=False)

    def _push(self, work: Work) -> None:
        if self._is_open(work):
            self._waiting.add(work)
            heapq.heappush(self._returned, (work.position, self._against[work], work.row))

    def _forget(self, work: Work) -> None:
        """Nobody wants this work any more; whoever still holds it may finish."""
        for what in (self._held, self._alone, self._against):
            what.pop(work, None)
        self._waiting.discard(work)

    def _is_open(self, work: Work) -> bool:
        examination = self._examinations.get(work.position)
        if work.row == _WHOLE:
            return not self._settled[work.position] and examination is None
        return examination is not None and work.row in examination.undecided

    def _accuse(self, lease: Lease, weight: int, reason: str) -> SetAside | None:
        work = lease.work
        self._take(lease)
        if not self._is_open(work):
            return None
        self._against[work] += weight
        self._let_go(lease)
        if work.row == _WHOLE:
            if self._against[work] >= self._budget.weight:
                self._examine(lease, reason)
            return None
        self._refuse_a_general_failure(lease, reason)
        return self._condemn(lease, reason) if self._against[work] >= self._budget.weight else None

    def _examine(self, lease: Lease, reason: str) -> None:
        """Take the chunk apart: from now on its rows are leased, each alone."""
        position = lease.work.position
        if position in self._left_out:
            raise TeacherError(
                f"chunk {lease.chunk} cannot be made although each of its sequences could be computed alone; the last attempt ended with: "
                f"{reason}. Every other published chunk is kept: see whether it exhausts the memory of its teacher "
                "(teacher.batch_sequences, teacher.block_tokens), and run again to go on from here."
            )
        self._forget(lease.work)
        rows = range(self._num_rows(lease.chunk))
        self._examinations[position] = _Examination(set(rows), [], reason)
        for row in rows:
            self._push(Work(position, row))

    def _refuse_a_general_failure(self, lease: Lease, reason: str) -> None:
        """Raise TeacherError where more rows are in doubt than may be set aside: then the fault is in no single one of them."""
        position, examination = lease.work.position, self._examinations[lease.work.position]
        doubtful = [row for row in sorted(examination.undecided) if self._against[Work(position, row)] >= _WEIGHT_OF_A_RAISE]
        if self.num_set_aside + len(doubtful) > self._budget.max_set_aside:
            shown = ", ".join(map(str, sorted([*examination.condemned, *doubtful])))
            raise TeacherError(
                f"chunk {lease.chunk} failed {self._budget.max_failures} times, and then its sequences did one by one (rows {shown}), "
                f"last with: {reason}. With {self.num_set_aside} set aside that is more than teacher.max_set_aside, "
                f"which is {self._budget.max_set_aside}. Every published chunk is kept: mend the cause and run again to go on from here."
            )

    def _condemn(self, lease: Lease, reason: str) -> SetAside | None:
        examination = self._examinations[lease.work.position]
        examination.undecided.remove(lease.work.row)
        examination.condemned.append(lease.work.row)
        examination.reason = reason
        self.num_set_aside += 1
        self._forget(lease.work)
        return self._conclude(lease.work.position)

    def _conclude(self, position: int) -> SetAside | None:
        """Once every row is decided the chunk is leased again, without the condemned ones and with its budget as new."""
        examination = self._examinations[position]
        if examination.undecided:
            return None
        del self._examinations[position]
        self._left_out[position] = frozenset(examination.condemned)
        self._push(Work(position))
        if not examination.condemned:
            return None
        return SetAside(int(self._order[position]), tuple(sorted(examination.condemned)), examination.reason)
