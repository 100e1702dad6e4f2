"""The fleet: it starts workers, watches them and ends them, and knows which leases each one holds.

It does not know which work is wanted: leases of a worker that is ended go to `give_back`.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic

from stillhouse.cluster.preemption import PreemptionNotice
from stillhouse.errors import TeacherError
from stillhouse.pool.events import Event, ItemT, ReadyT, WorkerBackend
from stillhouse.pool.heartbeats import Heartbeats
from stillhouse.pool.leases import Lease
from stillhouse.pool.poison import Budget

# one in work, and one that waits for it or is being published meanwhile: so no worker is idle for
# a round trip or an upload, and none has more than two computed blocks in memory
ITEMS_PER_WORKER = 2

_NOTICE_HOLDS_S = 300.0  # after its deadline: a machine that is still there stays after all
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 60.0  # between workers that are lost as they start
_DOOMED_PAUSE_S = 30.0  # after one that started on a machine that will be taken away


@dataclass(frozen=True, slots=True)
class Limits:
    """How many workers there may be, how long one may be silent, and what is tried before work is
    given up."""

    min_workers: int  # that must be ready before work begins
    max_workers: int
    watchdog_s: float  # without a heartbeat, after which a worker is replaced
    budget: Budget


@dataclass(slots=True)
class Worker:
    """A worker as the fleet knows it."""

    number: int
    node: str | None = None  # None until it is ready
    leases: dict[int, Lease] = field(default_factory=dict)  # in the order in which it works on them
    computed: set[int] = field(default_factory=set)  # those of which only publishing is left
    overdue_since: float | None = None
    leaves_at: float | None = None  # when its draining node ends; it gets no new leases

    @property
    def in_work(self) -> Lease | None:
        """What it computes; or publishes, if it computes nothing."""
        first = next(iter(self.leases.values()), None)
        return next(self._to_compute(), first)

    @property
    def waiting(self) -> list[int]:
        """The leases that it has not begun."""
        return [lease.id for lease in self._to_compute()][1:]

    def _to_compute(self) -> Iterator[Lease]:
        return (lease for lease in self.leases.values() if lease.id not in self.computed)


@dataclass(slots=True)
class _Pace:
    """When the next worker may be started: after a pause that doubles with each one that was lost
    as it started (backoff)."""

    num_lost: int = 0  # one after the other
    not_before: float = -math.inf

    def lose(self, now: float) -> None:
        self.num_lost += 1
        self.not_before = now + min(_FIRST_PAUSE_S * 2.0 ** min(self.num_lost, 16), _LAST_PAUSE_S)


class _Roster:
    """The workers by number, and indexes of those that something is to be done about: thousands of
    workers are never searched."""

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        # by the number of their leases
        self.with_room: list[dict[int, Worker]] = [{} for _ in range(ITEMS_PER_WORKER)]
        self.overdue: dict[int, Worker] = {}
        self.leaving: dict[int, Worker] = {}
        self._num_added = 0

    def add(self) -> Worker:
        worker = self.workers[self._num_added] = Worker(self._num_added)
        self._num_added += 1
        return worker

    def drop(self, worker: Worker) -> bool:
        """Remove the worker. Returns whether it was there."""
        was_there = self.workers.pop(worker.number, None) is not None
        self.file(worker)
        return was_there

    def file(self, worker: Worker) -> None:
        """Bring the indexes up to date for a worker that has changed."""
        for index in (*self.with_room, self.overdue, self.leaving):
            index.pop(worker.number, None)
        if worker.number not in self.workers:
            return
        if worker.leaves_at is not None:
            self.leaving[worker.number] = worker
        if worker.overdue_since is not None:
            self.overdue[worker.number] = worker
        elif (
            worker.node is not None
            and worker.leaves_at is None
            and len(worker.leases) < ITEMS_PER_WORKER
        ):
            self.with_room[len(worker.leases)][worker.number] = worker


class Fleet(Generic[ItemT, ReadyT]):
    """`min_workers` to `max_workers` workers of a backend.

    `compare(first, other, number)` raises where the worker of that number does not give the same
    results as the first one that was ready. `wall` is in unix seconds, as preemption notices are;
    `now` is in seconds from any beginning.
    """

    def __init__(
        self,
        backend: WorkerBackend[ItemT, ReadyT],
        limits: Limits,
        *,
        compare: Callable[[ReadyT, ReadyT, int], None],
        give_back: Callable[[Lease], None],
        wall: Callable[[], float],
    ):
        self._backend = backend
        self._limits = limits
        self._compare = compare
        self._give_back = give_back
        self._wall = wall
        self._roster, self._heartbeats, self._pace = _Roster(), Heartbeats(), _Pace()
        self._notices: dict[str, PreemptionNotice] = {}  # by node
        self._first: ReadyT | None = None
        self.begun = False  # True from when `min_workers` were ready at the same time
        self.num_ready = 0

    @property
    def with_room(self) -> list[dict[int, Worker]]:
        """The workers that can take work: element n has those with n leases."""
        return self._roster.with_room

    def staff(self, num_wanted: int, now: float) -> None:
        """Start workers up to the number that is wanted. One that leaves is replaced at once."""
        fewest = 1 if self.begun else self._limits.min_workers
        wanted = min(self._limits.max_workers, max(fewest, num_wanted))
        missing = wanted - (len(self._roster.workers) - len(self._roster.leaving))
        for _ in range(missing if now >= self._pace.not_before else 0):
            self._backend.spawn(self._roster.add().number)
        self.begun = self.begun or self.num_ready >= self._limits.min_workers

    def events(self, *, timeout_s: float) -> Iterator[tuple[Worker, Event[ReadyT]]]:
        """Events of workers that are still there; waits for the first one, but no longer than the
        timeout."""
        for event in self._backend.events(timeout_s=timeout_s):
            worker = self._roster.workers.get(event.worker)
            if worker is not None:  # it was not ended in this same round
                yield worker, event

    def welcome(self, worker: Worker, ready: ReadyT, now: float) -> None:
        """Take in a worker that passed its start-up check. Raises what `compare` does."""
        self._first = self._first or ready
        self._compare(self._first, ready, worker.number)
        worker.node = ready.node
        self.num_ready += 1
        self._pace.num_lost = 0
        self._roster.file(worker)
        if worker.node in self._doomed_nodes():
            self.retire(worker)
            self._pace.not_before = now + _DOOMED_PAUSE_S

    def submit(self, lease: Lease, item: ItemT) -> None:
        """Give the lease's holder its work."""
        worker = self._roster.workers[lease.holder]
        worker.leases[lease.id] = lease
        self._roster.file(worker)
        self._backend.submit(worker.number, lease.id, item, publish=lease.trial is None)

    def note_computed(self, worker: Worker, number: int) -> None:
        """Note that only publishing is left of a lease: the worker has begun its next one."""
        if number in worker.leases:
            worker.computed.add(number)

    def end(self, worker: Worker, number: int) -> Lease:
        """Take the lease off a worker that has answered. A worker that leaves is ended with its
        last one."""
        lease = worker.leases.pop(number)
        worker.computed.discard(number)
        worker.overdue_since = None
        if worker.leaves_at is not None and not worker.leases:
            self.retire(worker)
        self._roster.file(worker)
        return lease

    def note_late(self, lease: Lease, now: float) -> None:
        """Give no more work to a worker whose lease is past its deadline, until it answers."""
        worker = self._roster.workers[lease.holder]
        if worker.overdue_since is None:
            worker.overdue_since = now
            self._roster.file(worker)

    def overdue(self, now: float) -> list[Worker]:
        """The workers that have not answered for one more lease timeout."""
        longest_s = self._limits.budget.timeout_s
        return [
            worker
            for worker in self._roster.overdue.values()
            if worker.overdue_since is not None and now - worker.overdue_since >= longest_s
        ]

    def hear(self, heard: Collection[int], now: float) -> None:
        """Take in the numbers of workers that gave a heartbeat."""
        self._heartbeats.hear(heard & self._roster.workers.keys(), now)

    def silent(self, now: float) -> list[tuple[Worker, float]]:
        """The workers whose processes stand still: without a heartbeat for longer than the watchdog
        allows. Each comes with its seconds of silence."""
        found = self._heartbeats.silent(now, longer_than_s=self._limits.watchdog_s)
        return [(self._roster.workers[number], seconds) for number, seconds in found]

    def take_notices(self, notices: Mapping[str, PreemptionNotice], now: float) -> None:
        """Take in preemption notices, by node. Workers on draining nodes get no new leases, give
        back what they have not begun, and end with what they compute or publish."""
        self._notices.update(notices)
        doomed = self._doomed_nodes()
        for worker in [*self._roster.workers.values()] if doomed else ():
            if worker.node is not None and worker.node in doomed and worker.leaves_at is None:
                worker.leaves_at = now + self._notices[worker.node].deadline - self._wall()
                self._roster.file(worker)
                for number in worker.waiting:
                    self._give_back(worker.leases.pop(number))
        for worker in [*self._roster.leaving.values()]:
            if not worker.leases or (worker.leaves_at is not None and now >= worker.leaves_at):
                self.retire(worker)

    def lose(self, worker: Worker) -> Lease | None:
        """End a worker that is lost. Returns the lease that it had in work, which alone may have
        killed it; the others are given back."""
        lease = worker.in_work
        if lease is not None:
            del worker.leases[lease.id]
        self.retire(worker)
        return lease

    def lose_at_start(self, now: float) -> None:
        """Note that a worker was lost while it started: the next one is started after a pause."""
        self._pace.lose(now)

    def require_starts(self, reason: str) -> None:
        """Raise TeacherError where one worker after the other is lost as it starts, the last one
        for this reason."""
        most = self._limits.budget.max_failures * self._limits.max_workers
        if self._pace.num_lost >= most and self.num_ready == 0:
            raise TeacherError(
                f"{self._pace.num_lost} {self._limits.budget.words.worker}s died one after the "
                f"other while they started, the last with: {reason}; does the model fit into the "
                "memory of their machines?"
            )

    def retire(self, worker: Worker) -> None:
        """End a worker, if it is there, and give back the leases that it holds."""
        if not self._roster.drop(worker):
            return
        self._backend.kill(worker.number)
        for lease in worker.leases.values():
            self._give_back(lease)
        worker.leases.clear()
        self.num_ready -= worker.node is not None
        self._heartbeats.forget(worker.number)

    def release(self) -> None:
        """End all workers."""
        for worker in [*self._roster.workers.values()]:
            self.retire(worker)

    def _doomed_nodes(self) -> set[str]:
        return {
            node
            for node, notice in self._notices.items()
            if self._wall() < notice.deadline + _NOTICE_HOLDS_S
        }
