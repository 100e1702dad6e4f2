"""Which chunk is made next, and by which worker: a pure state machine over chunk numbers, without
Ray and without a clock.

Every wanted chunk is open or settled (published, or needed by nobody). Open ones are leased in the
order in which the students first read them, within a window of that order, to one worker each; a
second one only where the first is late or slow. Whatever becomes of leases, workers and clocks, an
open chunk can always be leased again, and a chunk that no worker can make is taken apart into its
sequences.

What it remembers grows with the leases that are out, not with the corpus, of which it keeps one
byte a chunk.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.pool.backlog import Backlog, Work
from stillhouse.pool.poison import DIED, RAISED, Budget, PoisonSearch, Ruling, SetAside

_SLOW = 2.0  # times the usual duration, after which an idle worker gets the chunk too
_REMEMBERED_DURATIONS = 63


@dataclass(frozen=True, slots=True)
class Lease:
    """A piece of work in the hands of one worker, until `deadline`."""

    id: int
    work: Work
    chunk: int
    left_out: frozenset[int]  # rows of the chunk that are set aside
    holder: int
    began: float
    deadline: float

    @property
    def trial(self) -> int | None:
        """The row that is computed alone, to see whether it can be; nothing of it is published.
        None: the chunk is made."""
        return None if self.work.is_whole else self.work.row


@dataclass(slots=True)
class Tally:
    """Leases that did not end as they should, under the names that the journal has for them."""

    failures: int = 0
    losses: int = 0
    late: int = 0
    hedged: int = 0


class LeaseTable:
    """`order` names the wanted chunks in reading order, `settled` which positions of it need no
    work, `num_rows` how long a chunk is."""

    def __init__(
        self,
        order: Sequence[int] | NDArray[np.int64],
        *,
        settled: NDArray[np.bool_],
        num_rows: Callable[[int], int],
        budget: Budget,
    ):
        self.tally = Tally()
        self._backlog = Backlog(order, settled=settled)
        self._search = PoisonSearch(num_rows, budget)
        self._timeout_s = budget.timeout_s
        self._next_id = 0
        self._active: dict[int, Lease] = {}  # by id, so by age
        self._late: dict[int, Lease] = {}  # given back, but with a worker still
        self._held: dict[Work, list[Lease]] = {}
        # held by one worker, the longest first
        self._alone: OrderedDict[Work, Lease] = OrderedDict()
        self._durations: deque[float] = deque(maxlen=_REMEMBERED_DURATIONS)
        self._void_before: dict[
            int, int
        ] = {}  # position -> leases with a lower id tell nothing about it: it was damaged since

    @property
    def num_wanted(self) -> int:
        return len(self._backlog)

    @property
    def num_settled(self) -> int:
        return self._backlog.num_settled

    @property
    def num_leased(self) -> int:
        """Pieces of work that a worker holds and that are still wanted."""
        return len(self._held)

    @property
    def num_out(self) -> int:
        """Leases that workers have not answered, late ones included."""
        return len(self._active) + len(self._late)

    @property
    def done(self) -> bool:
        return self.num_settled == self.num_wanted

    def held_back(self, *, limit: int) -> bool:
        """Whether work is waiting that only the window keeps from being leased."""
        work = self._backlog.next()
        return work is not None and work.position >= limit

    def lease(self, holder: int, *, limit: int, now: float) -> Lease | None:
        """The next work whose position in the reading order is below `limit`, now leased; None
        where there is none to give."""
        work = self._backlog.next()
        if work is None or work.position >= limit:
            return None
        self._backlog.take(work)
        return self._grant(work, holder, now)

    def hedge(self, holder: int, *, now: float) -> Lease | None:
        """The longest-running work of another worker, if it takes far longer than usual and nobody
        else was given it too."""
        if not self._alone or not self._durations:
            return None
        slow_s = _SLOW * sorted(self._durations)[len(self._durations) // 2]
        for work, first in self._alone.items():
            if now - first.began <= slow_s:
                return None
            if first.holder != holder:
                self.tally.hedged += 1
                return self._grant(work, holder, now)
        return None

    def expire(self, now: float) -> list[Lease]:
        """The leases whose deadline has come, now given back. Their holders may still answer."""
        expired = []
        while self._active and (oldest := next(iter(self._active.values()))).deadline <= now:
            self.tally.late += self._is_open(oldest.work)
            self._end(oldest)
            self._late[oldest.id] = oldest
            expired.append(oldest)
        return expired

    def publish(self, lease: Lease, *, now: float) -> None:
        """Its holder put the chunk into the store, or lost the race for it. A late answer is as
        good as any."""
        self._durations.append(now - lease.began)
        self.find(lease)

    def find(self, lease: Lease) -> None:
        """Its holder found the chunk in the store, and had nothing to do."""
        self._take(lease)
        position = lease.work.position
        if self._backlog.is_settled(position) or lease.id < self._void_before.get(position, 0):
            self._let_go(lease)
            return
        self._backlog.settle(position)
        self._apply(Ruling(closed=self._search.end(position)))

    def passed(self, lease: Lease) -> SetAside | None:
        """The row on trial could be computed. Returns what is set aside, where this was the last
        row in doubt."""
        self._take(lease)
        return (
            self._apply(self._search.acquit(lease.work, chunk=lease.chunk))
            if self._is_open(lease.work)
            else None
        )

    def give_back(self, lease: Lease) -> None:
        """The lease ended because its holder was sent away, or never began it."""
        self._end(lease)

    def lose(self, lease: Lease, reason: str, *, blame: bool = True) -> SetAside | None:
        """The lease ended because its worker died at it. Raises TeacherError and returns as `fail`
        does, after three times as many.

        Without `blame` it says nothing about the work: the machine was taken away.
        """
        self.tally.losses += 1
        if not blame:
            self._end(lease)
            return None
        return self._accuse(lease, DIED, reason)

    def fail(self, lease: Lease, reason: str) -> SetAside | None:
        """An attempt raised. After `max_failures` of them a chunk is examined row by row, and a row
        set aside.

        Returns what is set aside, once that is known of every row. Raises TeacherError where rows
        alone cannot explain it.
        """
        self.tally.failures += 1
        return self._accuse(lease, RAISED, reason)

    def reopen(self, *numbers: int) -> int:
        """These chunks are not in the store any more and have to be made again; how many are, for
        the others are not wanted, or open."""
        positions = self._backlog.reopen(numbers) if numbers else []
        self._void_before.update(dict.fromkeys(positions, self._next_id))
        return len(positions)

    def _grant(self, work: Work, holder: int, now: float) -> Lease:
        chunk, left_out = self._backlog.chunk(work.position), self._search.left_out(work.position)
        lease = Lease(self._next_id, work, chunk, left_out, holder, now, now + self._timeout_s)
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
            self._put_back(lease.work)

    def _watch(self, work: Work) -> None:
        """Keep the book of works that a single worker holds."""
        self._alone.pop(work, None)
        if len(self._held[work]) == 1:
            self._alone[work] = lease = self._held[work][0]
            if lease.id < self._next_id - 1:  # alone again, and older than most
                self._alone.move_to_end(work, last=False)

    def _put_back(self, work: Work) -> None:
        if self._is_open(work):
            self._backlog.put_back(work, weight=self._search.weight_against(work))

    def _is_open(self, work: Work) -> bool:
        return not self._backlog.is_settled(work.position) and self._search.wants(work)

    def _accuse(self, lease: Lease, weight: int, reason: str) -> SetAside | None:
        self._take(lease)
        if not self._is_open(lease.work):
            return None
        found = self._apply(
            self._search.accuse(lease.work, weight, chunk=lease.chunk, reason=reason)
        )
        self._let_go(lease)
        return found

    def _apply(self, ruling: Ruling) -> SetAside | None:
        """Work that nobody wants any more is forgotten, and whoever still holds it may finish."""
        for work in ruling.closed:
            self._held.pop(work, None)
            self._alone.pop(work, None)
            self._backlog.discard(work)
        for work in ruling.opened:
            self._put_back(work)
        return ruling.set_aside
