"""Leases: which chunk is made next, and by which worker. A pure state machine over chunk numbers,
without Ray and without a clock.

A wanted chunk is open or settled (published, or needed by no consumer). Open chunks are leased in
the order in which students first read them, within a window of that order, to one worker each; a
late or slow one also to a second worker. Whatever happens to leases, workers and clocks, an open
chunk can always be leased again. A chunk that no worker can make is taken apart into its rows.

Memory: one byte a chunk, and what the leases that are out need.
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
    """A piece of work that one worker holds, until `deadline`."""

    id: int
    work: Work
    chunk: int
    left_out: frozenset[int]  # rows of the chunk that are set aside
    holder: int
    began: float
    deadline: float

    @property
    def trial(self) -> int | None:
        """The row that is computed alone, to find out whether it can be; nothing of it is
        published. None: the whole chunk is made."""
        return None if self.work.is_whole else self.work.row


@dataclass(slots=True)
class Tally:
    """Leases that ended in another way than by an answer, under the journal's names for them."""

    failures: int = 0
    losses: int = 0
    late: int = 0
    hedged: int = 0


class LeaseTable:
    """Leases of wanted chunks.

    `order`: the wanted chunks in reading order. `settled`: which positions of it need no work.
    `num_rows(chunk)`: the number of its rows.
    """

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
        self._late: dict[int, Lease] = {}  # given back, but still in a worker's hands
        self._held: dict[Work, list[Lease]] = {}
        # held by one worker, the longest first
        self._alone: OrderedDict[Work, Lease] = OrderedDict()
        self._durations: deque[float] = deque(maxlen=_REMEMBERED_DURATIONS)
        # position -> first lease that counts: the chunk was damaged after all earlier ones
        self._void_before: dict[int, int] = {}

    @property
    def num_wanted(self) -> int:
        return len(self._backlog)

    @property
    def num_settled(self) -> int:
        return self._backlog.num_settled

    @property
    def num_leased(self) -> int:
        """Pieces of wanted work that a worker holds."""
        return len(self._held)

    @property
    def num_out(self) -> int:
        """Leases that workers have not answered, late ones included."""
        return len(self._active) + len(self._late)

    @property
    def done(self) -> bool:
        return self.num_settled == self.num_wanted

    def held_back(self, *, limit: int) -> bool:
        """Whether the next work may not be leased only because the window ends at `limit`."""
        work = self._backlog.next()
        return work is not None and work.position >= limit

    def lease(self, holder: int, *, limit: int, now: float) -> Lease | None:
        """Lease the next work, if its position in the reading order is below `limit`; None where
        there is none to lease."""
        work = self._backlog.next()
        if work is None or work.position >= limit:
            return None
        self._backlog.take(work)
        return self._grant(work, holder, now)

    def hedge(self, holder: int, *, now: float) -> Lease | None:
        """Lease the longest-running work of another worker a second time (a hedge), if it takes far
        longer than usual and no other worker holds it."""
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
        """Give back the leases whose deadline has come, and return them. Their holders may still
        answer."""
        expired = []
        while self._active and (oldest := next(iter(self._active.values()))).deadline <= now:
            self.tally.late += self._is_open(oldest.work)
            self.give_back(oldest)
            self._late[oldest.id] = oldest
            expired.append(oldest)
        return expired

    def publish(self, lease: Lease, *, now: float) -> None:
        """End a lease whose holder published the chunk, or was second to do so. A late answer is as
        good as any."""
        self._durations.append(now - lease.began)
        self.find(lease)

    def find(self, lease: Lease) -> None:
        """End a lease whose holder found the chunk in the store and computed nothing."""
        self._take(lease)
        position = lease.work.position
        if self._backlog.is_settled(position) or lease.id < self._void_before.get(position, 0):
            self._let_go(lease)
            return
        self._backlog.settle(position)
        self._apply(Ruling(closed=self._search.end(position)))

    def passed(self, lease: Lease) -> SetAside | None:
        """End a lease whose row on trial could be computed. Returns what is set aside, where this
        was the last row in doubt."""
        self._take(lease)
        if not self._is_open(lease.work):
            return None
        return self._apply(self._search.acquit(lease.work, chunk=lease.chunk))

    def give_back(self, lease: Lease) -> None:
        """End a lease whose holder was sent away, never began it or is late: other workers may have
        the work."""
        self._take(lease)
        self._let_go(lease)

    def lose(self, lease: Lease, reason: str, *, blame: bool = True) -> SetAside | None:
        """End a lease whose worker was lost. Raises TeacherError and returns as `fail` does, after
        three times as many.

        `blame`: the work may have killed the worker; not so where its machine was taken away.
        """
        self.tally.losses += 1
        if not blame:
            self.give_back(lease)
            return None
        return self._accuse(lease, DIED, reason)

    def fail(self, lease: Lease, reason: str) -> SetAside | None:
        """End a lease whose worker raised. After `max_failures` of them a chunk is examined row by
        row, and a row set aside.

        Returns what is set aside, once that is known of every row. Raises TeacherError where rows
        alone cannot explain it.
        """
        self.tally.failures += 1
        return self._accuse(lease, RAISED, reason)

    def reopen(self, *numbers: int) -> int:
        """Have chunks made again that are not in the store any more. Returns how many were settled;
        the others are open already, or not wanted."""
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

    def _take(self, lease: Lease) -> None:
        """Take the lease off the list of leases that are out. Raises KeyError where it is not on
        it."""
        if self._late.pop(lease.id, None) is None:
            del self._active[lease.id]

    def _let_go(self, lease: Lease) -> None:
        """Return the lease's work to the backlog, if it is wanted and no other worker holds it."""
        holders = self._held.get(lease.work, [])
        if lease not in holders:
            return
        holders.remove(lease)
        self._watch(lease.work)
        if not holders:
            del self._held[lease.work]
            self._put_back(lease.work)

    def _watch(self, work: Work) -> None:
        """Keep `_alone` true for this work."""
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
        ruling = self._search.accuse(lease.work, weight, chunk=lease.chunk, reason=reason)
        found = self._apply(ruling)
        self._let_go(lease)
        return found

    def _apply(self, ruling: Ruling) -> SetAside | None:
        """Forget closed work, whose holders may still finish it, and add opened work to the
        backlog."""
        for work in ruling.closed:
            self._held.pop(work, None)
            self._alone.pop(work, None)
            self._backlog.discard(work)
        for work in ruling.opened:
            self._put_back(work)
        return ruling.set_aside
