"""The worker pool: workers that come and go, work leased to them in reading order, and a window that holds them back.

No result passes through here: a worker gets an item, publishes a chunk, and answers with its name and size. Nor does Ray: what starts
workers, carries work to them and brings their answers is a `Crew`.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from stillhouse.cluster.preemption import PreemptionNotice
from stillhouse.errors import StillhouseError, StoreUnavailable, TeacherError, UserError
from stillhouse.pool.events import Answer, Answered, Crew, Died, Event, Found, Inbox, ItemT, Passed, Produced, Raised, ReadyT, Started
from stillhouse.pool.leases import Lease, LeaseTable
from stillhouse.pool.poison import Budget, SetAside
from stillhouse.pool.pulses import Pulses
from stillhouse.pool.retention import Retention
from stillhouse.store import ChunkStore
from stillhouse.tracking import PoolRow, RepairRow, SetAsideRow, StallRow, Tracker

_log = logging.getLogger(__name__)

ITEMS_PER_WORKER = 2  # one in work, one waiting beside it, so that no worker idles for a round trip

_POLL_S = 0.25
_NEWS_EVERY_S = 0.1
_READERS_EVERY_S = 5.0
_ROW_EVERY_S = 2.0
_NOTICE_HOLDS_S = 300.0  # after its deadline: a machine that lives on was not meant after all
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 60.0  # between teachers that die as they start
_DOOMED_PAUSE_S = 30.0  # after one that came up on a machine that goes


@dataclass(frozen=True, slots=True)
class Limits:
    """How many workers there may be, how long one may be silent, and what is tried before something is given up."""

    min_workers: int  # that must be ready before work begins
    max_workers: int
    watchdog_s: float  # without a heartbeat, after which a worker is replaced
    budget: Budget


@dataclass(slots=True)
class _Worker:
    number: int
    node: str | None = None  # None until it is ready
    leases: dict[int, Lease] = field(default_factory=dict)  # in the order in which it works on them
    overdue_since: float | None = None
    leaves_at: float | None = None  # its node is draining: no new leases, and the end of the one in work


class Dispatcher(Generic[ItemT, ReadyT]):
    """Makes the wanted chunks with `min_workers` to `max_workers` workers; `run` until it is told to stop.

    `compare` raises where a worker (the second, of that number) is not the same as the first that was ready. `clock` gives seconds from
    any beginning, `wall` seconds since 1970, which notices are in.
    """

    def __init__(
        self,
        crew: Crew[ItemT, ReadyT],
        limits: Limits,
        *,
        compare: Callable[[ReadyT, ReadyT, int], None],
        store: ChunkStore,
        order: Sequence[int] | NDArray[np.int64],
        item_of: Callable[[int], ItemT],
        window_chunks: int,
        journal: Tracker,
        retention: Retention | None = None,
        clock: Callable[[], float] = monotonic,
        wall: Callable[[], float] = time,
    ):
        self._crew, self._limits, self._compare, self._store, self._order = crew, limits, compare, store, np.asarray(order, dtype=np.int64)
        self._item_of, self._window_chunks, self._journal, self._retention = item_of, window_chunks, journal, retention
        self._clock, self._wall = clock, wall
        self._table = LeaseTable(
            self._order,
            settled=self._positions_settled(),
            num_rows=lambda number: len(store.recipe.chunk_rows(number)),
            budget=limits.budget,
        )
        self._teachers: dict[int, _Worker] = {}
        self._with_room: list[dict[int, _Worker]] = [{} for _ in range(ITEMS_PER_WORKER)]  # by the number of their leases
        self._overdue: dict[int, _Worker] = {}
        self._leaving: dict[int, _Worker] = {}
        self._pulses = Pulses()
        self._notices: dict[str, PreemptionNotice] = {}
        self._cursors: dict[str, int] = {}
        self._first: ReadyT | None = None
        self._begun = False  # once `min_workers` have been ready together, it stays begun
        self._num_ready = self._num_spawned = self._num_lost_starting = self._num_refused = 0
        self._tokens_since_row, self._window_wait_s = 0, 0.0
        self._last_row = self._last_look = clock()
        self._next_spawn = self._next_news = self._next_readers = -np.inf

    def run(self, *, readers: Collection[str], coordinator: Inbox, finished: Callable[[], bool]) -> None:
        """Produce until every wanted chunk is published and `finished()`; `readers` are the students that move cursors on the coordinator.

        Without readers nothing holds the teachers back. Raises TeacherError where chunks or start-up checks fail too often, and what
        `finished` raises as soon as it does: behind a closed window a student that has failed would be waited for without end.
        """
        if self._table.done:
            self._record(self._clock(), force=True)  # that there is nothing to make
        try:
            while not (finished() and self._table.done):
                self._look_around(coordinator, self._clock())
                self._advance(limit=self._limit(readers))
            if self._retention is not None:
                self._retention.finish()
        finally:
            self._release()

    def _positions_settled(self) -> NDArray[np.bool_]:
        found = self._store.listing()
        for number in sorted(found.cut.intersection(self._order.tolist())):
            if self._store.quarantine(number):
                self._journal.record(RepairRow(number))
        published = np.fromiter(found.published, dtype=np.int64)
        settled = np.isin(self._order, published)
        return settled if self._retention is None else settled | ~self._retention.begin(published)[self._order]

    def _look_around(self, coordinator: Inbox, now: float) -> None:
        """Take in what others know, each as often as it may matter."""
        if now >= self._next_news:
            news = coordinator.read()
            self._next_news = now + _NEWS_EVERY_S
            self._cursors.update(news.cursors)
            self._notices.update(news.notices)
            self._pulses.hear(news.heard_teachers & self._teachers.keys(), now)
            self._replace_the_silent(now)
            for number in news.bad_chunks:
                self._replace(number)
            self._heed_notices(now)
        if self._retention is not None and now >= self._next_readers:
            self._next_readers = now + _READERS_EVERY_S
            self._table.reopen(*self._retention.look())

    def _limit(self, readers: Collection[str]) -> int:
        """The position in the reading order that no lease may reach.

        A reader of another run may hold it back too, though never so far that the readers of this one would lack what they need next.
        """
        own = min((self._cursors.get(reader, 0) for reader in readers), default=self._table.num_wanted)
        if self._retention is None:
            return own + self._window_chunks
        return self._retention.limit(own, self._window_chunks)

    def _advance(self, *, limit: int) -> None:
        """One round: staff the pool, hand out what may be handed out, and take in answers for a moment."""
        now = self._clock()
        if self._table.done:
            self._release()  # the processors are the students' now
        else:
            self._staff(now)
        self._begun = self._begun or self._num_ready >= self._limits.min_workers
        self._call_in_late_work(now)
        if self._begun:
            self._hand_out(limit, now)
        for event in self._crew.events(timeout_s=_POLL_S):
            self._take_in(event)
        now = self._clock()
        if self._table.held_back(limit=limit) and not self._table.num_leased:
            self._window_wait_s += now - self._last_look
        self._last_look = now
        self._record(now)

    def _staff(self, now: float) -> None:
        """Fill the pool up, but not with more teachers than there are chunks to make. Those that leave have their successors at once."""
        fewest = 1 if self._begun else self._limits.min_workers
        wanted = min(self._limits.max_workers, max(fewest, self._table.num_wanted - self._table.num_settled))
        missing = wanted - (len(self._teachers) - len(self._leaving))
        if missing <= 0 or now < self._next_spawn:
            return
        for _ in range(missing):
            teacher = _Worker(self._num_spawned)
            self._num_spawned += 1
            self._teachers[teacher.number] = teacher
            self._crew.spawn(teacher.number)

    def _hand_out(self, limit: int, now: float) -> None:
        """Leases to teachers with room, the idle first; where no work is left, slow work to the idle."""
        for with_room in self._with_room:
            while with_room and (lease := self._table.lease(next(iter(with_room)), limit=limit, now=now)) is not None:
                self._submit(lease)
        idle = self._with_room[0]
        while idle and (lease := self._table.hedge(next(iter(idle)), now=now)) is not None:
            self._submit(lease)

    def _submit(self, lease: Lease) -> None:
        item = self._item_of(lease.chunk)
        if lease.left_out:
            item = item.without(lease.left_out)
        if lease.trial is not None:
            item = item.only(lease.trial)
        teacher = self._teachers[lease.holder]
        teacher.leases[lease.id] = lease
        self._file(teacher)
        self._crew.submit(teacher.number, lease.id, item, publish=lease.trial is None)

    def _file(self, teacher: _Worker) -> None:
        """Note whether, and how urgently, a teacher can take work."""
        for with_room in self._with_room:
            with_room.pop(teacher.number, None)
        able = teacher.node is not None and teacher.leaves_at is None and teacher.overdue_since is None
        if able and teacher.number in self._teachers and len(teacher.leases) < ITEMS_PER_WORKER:
            self._with_room[len(teacher.leases)][teacher.number] = teacher

    def _call_in_late_work(self, now: float) -> None:
        """Work that is past its deadline goes to others; a teacher that then stays silent for as long again is given up."""
        for lease in self._table.expire(now):
            teacher = self._teachers[lease.holder]
            if teacher.overdue_since is None:
                teacher.overdue_since = now
                self._overdue[teacher.number] = teacher
                self._file(teacher)
        for teacher in [*self._overdue.values()]:
            if teacher.overdue_since is not None and now - teacher.overdue_since >= self._limits.budget.timeout_s:
                self._lose(teacher, "it did not answer for two lease timeouts", blame=True)

    def _replace_the_silent(self, now: float) -> None:
        """Kill teachers whose processes stand still: without a heartbeat for as long as the watchdog allows."""
        for number, silent_s in self._pulses.silent(now, longer_than_s=self._limits.watchdog_s):
            teacher = self._teachers[number]
            lease = next(iter(teacher.leases.values()), None)
            phase = "start" if teacher.node is None else "work"
            self._journal.record(StallRow("teacher", number, 0, phase, silent_s, "", None if lease is None else lease.chunk))
            self._die(teacher, Died(number, f"it gave no heartbeat for {silent_s:.0f} s"))

    def _take_in(self, event: Event[ReadyT]) -> None:
        teacher = self._teachers.get(event.worker)
        if teacher is None:
            return  # it was sent away in this same round
        match event:
            case Started(ready=ready):
                self._welcome(teacher, ready)
            case Answered(lease=number, answer=answer):
                self._accept(teacher, self._end_of(teacher, number), answer)
            case Raised(lease=None, error=error):
                self._fail_to_start(teacher, error)
            case Raised(lease=int(number), error=error):
                self._fail(teacher, self._end_of(teacher, number), error)
            case Died():
                self._die(teacher, event)

    def _end_of(self, teacher: _Worker, number: int) -> Lease:
        """Take the lease off its teacher, who thereby has given a heartbeat; one that leaves goes now."""
        lease = teacher.leases.pop(number)
        teacher.overdue_since = None
        self._overdue.pop(teacher.number, None)
        if teacher.leaves_at is not None:
            self._retire(teacher)
        self._file(teacher)
        return lease

    def _welcome(self, teacher: _Worker, ready: ReadyT) -> None:
        self._first = self._first or ready
        self._compare(self._first, ready, teacher.number)
        teacher.node = ready.node
        self._num_ready += 1
        self._num_lost_starting = 0
        self._journal.record(ready.journal_row(teacher.number))
        self._file(teacher)
        if teacher.node in self._doomed_nodes():
            self._retire(teacher)
            self._next_spawn = self._clock() + _DOOMED_PAUSE_S

    def _accept(self, teacher: _Worker, lease: Lease, answer: Answer) -> None:
        match answer:
            case Passed():
                self._tell(self._table.passed(lease))
            case Found():
                self._table.find(lease)
                self._note_published(lease.chunk)
            case _:
                self._publish(teacher, lease, answer)
        if self._table.done:
            self._record(self._clock(), force=True)

    def _publish(self, teacher: _Worker, lease: Lease, answer: Produced) -> None:
        self._num_refused = 0
        self._table.publish(lease, now=self._clock())
        self._note_published(lease.chunk)
        self._tokens_since_row += answer.num_tokens
        self._journal.record(answer.journal_row(teacher.number))

    def _note_published(self, number: int) -> None:
        if self._retention is not None:
            self._retention.published(number)

    def _fail(self, teacher: _Worker, lease: Lease, cause: BaseException) -> None:
        _log.info("teacher %d failed at chunk %d: %r", teacher.number, lease.chunk, cause)
        if isinstance(cause, StoreUnavailable):  # it waited with the chunk in hand for as long as it may
            self._num_refused += 1
            if self._num_refused >= self._limits.budget.max_failures * max(1, self._num_ready):
                raise cause
            self._table.give_back(lease)
            return
        if isinstance(cause, UserError):
            raise cause  # a store without permission: every other attempt would meet it too
        if not isinstance(cause, StillhouseError):
            self._retire(teacher)  # after an error on the GPU nothing works in that process any more
        self._tell(self._table.fail(lease, f"{type(cause).__name__}: {cause}"))

    def _fail_to_start(self, teacher: _Worker, cause: BaseException) -> None:
        if not self._begun:  # every other teacher would most likely meet the same
            raise cause if isinstance(cause, StillhouseError) else TeacherError(f"a teacher could not start: {cause!r}") from cause
        self._die(teacher, Died(teacher.number, repr(cause)))

    def _die(self, teacher: _Worker, death: Died) -> None:
        """A teacher is gone, as machines go. Whoever staffs the pool next replaces it."""
        _log.info("teacher %d is gone: %s", teacher.number, death.reason)
        announced = death.preempted or teacher.leaves_at is not None
        if teacher.node is None and not announced and not death.with_machine:
            self._num_lost_starting += 1
            pause_s = _FIRST_PAUSE_S * 2.0 ** min(self._num_lost_starting, 16)
            self._next_spawn = self._clock() + min(pause_s, _LAST_PAUSE_S)
        self._lose(teacher, death.reason, blame=not announced)
        most = self._limits.budget.max_failures * self._limits.max_workers
        if self._num_lost_starting >= most and self._num_ready == 0:
            raise TeacherError(
                f"{self._num_lost_starting} teachers died one after the other while they started, the last with: {death.reason}; "
                "does the model fit into the memory of their machines?"
            )

    def _lose(self, teacher: _Worker, reason: str, *, blame: bool) -> None:
        """Give up on a teacher. Only what it had in work may have killed it, and not where its end was announced."""
        in_work = next(iter(teacher.leases), None)
        lease = teacher.leases.pop(in_work) if in_work is not None else None
        self._retire(teacher)
        if lease is not None:
            self._tell(self._table.lose(lease, reason, blame=blame))

    def _retire(self, teacher: _Worker) -> None:
        """Send a teacher away: what it still held is given back."""
        if self._teachers.pop(teacher.number, None) is None:
            return
        self._crew.kill(teacher.number)
        for lease in teacher.leases.values():
            self._table.give_back(lease)
        teacher.leases.clear()
        self._num_ready -= teacher.node is not None
        self._overdue.pop(teacher.number, None)
        self._leaving.pop(teacher.number, None)
        self._pulses.forget(teacher.number)
        self._file(teacher)

    def _doomed_nodes(self) -> set[str]:
        return {node for node, notice in self._notices.items() if self._wall() < notice.deadline + _NOTICE_HOLDS_S}

    def _heed_notices(self, now: float) -> None:
        """Teachers on draining nodes get no new leases, hand back what they have not begun, and go with what they have in work."""
        doomed = self._doomed_nodes() if self._notices else ()
        for teacher in [*self._teachers.values()] if doomed else ():
            if teacher.node is not None and teacher.node in doomed and teacher.leaves_at is None:
                teacher.leaves_at = now + self._notices[teacher.node].deadline - self._wall()
                self._leaving[teacher.number] = teacher
                self._file(teacher)
                for number in [*teacher.leases][1:]:
                    self._table.give_back(teacher.leases.pop(number))
        for teacher in [*self._leaving.values()]:
            if not teacher.leases or (teacher.leaves_at is not None and now >= teacher.leaves_at):
                self._retire(teacher)

    def _tell(self, found: SetAside | None) -> None:
        if found is not None:
            sequences = self._store.recipe.chunk_rows(found.chunk)
            _log.warning("%d sequences of chunk %d are set aside: %s", len(found.rows), found.chunk, found.reason)
            self._journal.record(SetAsideRow(found.chunk, [sequences[row] for row in found.rows], found.reason))

    def _replace(self, number: int) -> None:
        """A reader found the chunk damaged or gone. The store looks first: readers may err, and two may report the same one."""
        if not self._store.exists(number):
            self._table.reopen(number)
        elif self._store.quarantine(number):
            self._table.reopen(number)
            _log.warning("chunk %d was damaged: it lies in quarantine, and is made again", number)
            self._journal.record(RepairRow(number))

    def _record(self, now: float, *, force: bool = False) -> None:
        seconds = now - self._last_row
        if not force and (seconds < _ROW_EVERY_S or self._table.done):
            return
        table = self._table
        self._journal.record(
            PoolRow(
                published=table.num_settled,
                needed=table.num_wanted,
                in_flight=table.num_leased,
                window_chunks=min(self._window_chunks, table.num_wanted),
                tokens_per_s=self._tokens_since_row / max(seconds, 1e-9),
                window_wait_s=self._window_wait_s,
                failures=table.tally.failures,
                replicas=self._num_ready,
                losses=table.tally.losses,
                late=table.tally.late,
                hedged=table.tally.hedged,
            )
        )
        self._last_row, self._tokens_since_row = now, 0

    def _release(self) -> None:
        for teacher in [*self._teachers.values()]:
            self._retire(teacher)
