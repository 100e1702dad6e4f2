"""The fleet: workers that are started, welcomed, watched and sent away, and the leases that each of
them holds.

Nothing here knows which work is wanted: leases of a worker that goes are handed to `give_back`.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic

from stillhouse.cluster.preemption import PreemptionNotice
from stillhouse.errors import TeacherError
from stillhouse.pool.events import Crew, Event, ItemT, ReadyT
from stillhouse.pool.leases import Lease
from stillhouse.pool.poison import Budget
from stillhouse.pool.pulses import Pulses

ITEMS_PER_WORKER = 2  # one in work, one waiting beside it, so that no worker idles for a round trip

_NOTICE_HOLDS_S = 300.0  # after its deadline: a machine that lives on was not meant after all
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 60.0  # between workers that die as they start
_DOOMED_PAUSE_S = 30.0  # after one that came up on a machine that goes


@dataclass(frozen=True, slots=True)
class Limits:
    """How many workers there may be, how long one may be silent, and what is tried before something
    is given up."""

    min_workers: int  # that must be ready before work begins
    max_workers: int
    watchdog_s: float  # without a heartbeat, after which a worker is replaced
    budget: Budget


@dataclass(slots=True)
class Worker:
    number: int
    node: str | None = None  # None until it is ready
    leases: dict[int, Lease] = field(default_factory=dict)  # in the order in which it works on them
    overdue_since: float | None = None
    leaves_at: float | None = (
        None  # its node is draining: no new leases, and the end of the one in work
    )


@dataclass(slots=True)
class _Pace:
    """When the next worker may be started: later and later after workers that die as they start."""

    num_lost: int = 0  # one after the other
    not_before: float = -math.inf

    def lose(self, now: float) -> None:
        self.num_lost += 1
        self.not_before = now + min(_FIRST_PAUSE_S * 2.0 ** min(self.num_lost, 16), _LAST_PAUSE_S)


class _Roster:
    """The workers by number, and those of them that something is to be done about, so that none has
    to be searched for."""

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
        """Whether it was there."""
        was_there = self.workers.pop(worker.number, None) is not None
        self.file(worker)
        return was_there

    def file(self, worker: Worker) -> None:
        """Note what is to be done about a worker that has changed, and how urgently it can take
        work."""
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
    """`min_workers` to `max_workers` workers of a crew.

    `compare` raises where a worker (the second, of that number) is not the same as the first that
    was ready. `wall` gives seconds since 1970, which notices are in; `now` is in seconds from any
    beginning.
    """

    def __init__(
        self,
        crew: Crew[ItemT, ReadyT],
        limits: Limits,
        *,
        compare: Callable[[ReadyT, ReadyT, int], None],
        give_back: Callable[[Lease], None],
        wall: Callable[[], float],
    ):
        self._crew = crew
        self._limits = limits
        self._compare = compare
        self._give_back = give_back
        self._wall = wall
        self._roster, self._pulses, self._pace = _Roster(), Pulses(), _Pace()
        self._notices: dict[str, PreemptionNotice] = {}  # by node
        self._first: ReadyT | None = None
        self.begun = False  # once `min_workers` have been ready together, it stays begun
        self.num_ready = 0

    @property
    def with_room(self) -> list[dict[int, Worker]]:
        """The workers that can take work, by the number of leases that they have."""
        return self._roster.with_room

    def staff(self, num_wanted: int, now: float) -> None:
        """Fill the fleet up, but not with more than are wanted. Those that leave have their
        successors at once."""
        fewest = 1 if self.begun else self._limits.min_workers
        wanted = min(self._limits.max_workers, max(fewest, num_wanted))
        missing = wanted - (len(self._roster.workers) - len(self._roster.leaving))
        for _ in range(missing if now >= self._pace.not_before else 0):
            self._crew.spawn(self._roster.add().number)
        self.begun = self.begun or self.num_ready >= self._limits.min_workers

    def events(self, *, timeout_s: float) -> Iterator[tuple[Worker, Event[ReadyT]]]:
        """What has happened to workers that are still there; waits for the first of it, no longer
        than the timeout."""
        for event in self._crew.events(timeout_s=timeout_s):
            worker = self._roster.workers.get(event.worker)
            if worker is not None:  # or it was sent away in this same round
                yield worker, event

    def welcome(self, worker: Worker, ready: ReadyT, now: float) -> None:
        """It passed its start-up check. Raises what `compare` does."""
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
        worker = self._roster.workers[lease.holder]
        worker.leases[lease.id] = lease
        self._roster.file(worker)
        self._crew.submit(worker.number, lease.id, item, publish=lease.trial is None)

    def end(self, worker: Worker, number: int) -> Lease:
        """Take the lease off its worker, who thereby has given a heartbeat; one that leaves goes
        now."""
        lease = worker.leases.pop(number)
        worker.overdue_since = None
        if worker.leaves_at is not None:
            self.retire(worker)
        self._roster.file(worker)
        return lease

    def note_late(self, lease: Lease, now: float) -> None:
        """Work is past its deadline: its worker gets no more until it answers."""
        worker = self._roster.workers[lease.holder]
        if worker.overdue_since is None:
            worker.overdue_since = now
            self._roster.file(worker)

    def overdue(self, now: float) -> list[Worker]:
        """The workers that have stayed silent for one more lease timeout."""
        longest_s = self._limits.budget.timeout_s
        found = self._roster.overdue.values()
        return [
            worker
            for worker in found
            if worker.overdue_since is not None and now - worker.overdue_since >= longest_s
        ]

    def hear(self, heard: Collection[int], now: float) -> None:
        """These workers gave heartbeats."""
        self._pulses.hear(heard & self._roster.workers.keys(), now)

    def silent(self, now: float) -> list[tuple[Worker, float]]:
        """The workers without a heartbeat for longer than the watchdog allows, each with its
        seconds: their processes stand still."""
        found = self._pulses.silent(now, longer_than_s=self._limits.watchdog_s)
        return [(self._roster.workers[number], seconds) for number, seconds in found]

    def heed(self, notices: Mapping[str, PreemptionNotice], now: float) -> None:
        """Workers on draining nodes get no new leases, hand back what they have not begun, and go
        with what they have in work."""
        self._notices.update(notices)
        doomed = self._doomed_nodes()
        for worker in [*self._roster.workers.values()] if doomed else ():
            if worker.node is not None and worker.node in doomed and worker.leaves_at is None:
                worker.leaves_at = now + self._notices[worker.node].deadline - self._wall()
                self._roster.file(worker)
                for number in [*worker.leases][1:]:
                    self._give_back(worker.leases.pop(number))
        for worker in [*self._roster.leaving.values()]:
            if not worker.leases or (worker.leaves_at is not None and now >= worker.leaves_at):
                self.retire(worker)

    def lose(self, worker: Worker) -> Lease | None:
        """Give up on a worker. Returns what it had in work: only that may have killed it."""
        in_work = next(iter(worker.leases), None)
        lease = worker.leases.pop(in_work) if in_work is not None else None
        self.retire(worker)
        return lease

    def lose_at_start(self, now: float) -> None:
        """A worker died while it started: the next one is started after a pause."""
        self._pace.lose(now)

    def require_starts(self, reason: str) -> None:
        """Raise TeacherError where workers do nothing but die as they start, the last for this
        reason."""
        if (
            self._pace.num_lost >= self._limits.budget.max_failures * self._limits.max_workers
            and self.num_ready == 0
        ):
            raise TeacherError(
                f"{self._pace.num_lost} teachers died one after the other while they started, the "
                f"last with: {reason}; "
                "does the model fit into the memory of their machines?"
            )

    def retire(self, worker: Worker) -> None:
        """Send a worker away, if it is there: what it still held is given back."""
        if not self._roster.drop(worker):
            return
        self._crew.kill(worker.number)
        for lease in worker.leases.values():
            self._give_back(lease)
        worker.leases.clear()
        self.num_ready -= worker.node is not None
        self._pulses.forget(worker.number)

    def release(self) -> None:
        """Send all workers away."""
        for worker in [*self._roster.workers.values()]:
            self.retire(worker)

    def _doomed_nodes(self) -> set[str]:
        return {
            node
            for node, notice in self._notices.items()
            if self._wall() < notice.deadline + _NOTICE_HOLDS_S
        }
