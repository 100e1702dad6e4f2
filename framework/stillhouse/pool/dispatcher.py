"""The dispatcher: it leases work to a fleet of workers in reading order, within a window.

No result passes through it: a worker gets an item, publishes a chunk, and answers with its name and
size. It does not use Ray: a `WorkerBackend` starts workers, passes work to them and their answers
back.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from time import monotonic, time
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import StillhouseError, StoreUnavailable, TeacherError, UserError
from stillhouse.pool.events import (
    Answer,
    Answered,
    Computed,
    Died,
    Event,
    Found,
    Inbox,
    ItemT,
    Passed,
    Raised,
    ReadyT,
    Started,
    WorkerBackend,
)
from stillhouse.pool.fleet import Fleet, Limits, Worker
from stillhouse.pool.leases import Lease, LeaseTable
from stillhouse.pool.poison import SetAside
from stillhouse.pool.progress import Progress
from stillhouse.pool.retention import Retention
from stillhouse.pool.stock import BlockStore, Stock
from stillhouse.tracking import SetAsideEvent, StallEvent, Tracker

_log = logging.getLogger(__name__)

_POLL_S = 0.25
_NEWS_EVERY_S = 0.1


class Dispatcher(Generic[ItemT, ReadyT]):
    """Makes the chunks of `order`, in that order, with the workers of a fleet.

    `item_of(chunk)` is what a worker needs to make it; `retention` is as in `Stock`, `compare` and
    `wall` are as in `Fleet`; `clock` is in seconds from any beginning.
    """

    def __init__(
        self,
        backend: WorkerBackend[ItemT, ReadyT],
        limits: Limits,
        *,
        compare: Callable[[ReadyT, ReadyT, int], None],
        store: BlockStore,
        order: Sequence[int] | NDArray[np.int64],
        item_of: Callable[[int], ItemT],
        window_chunks: int,
        journal: Tracker,
        retention: Retention | None = None,
        clock: Callable[[], float] = monotonic,
        wall: Callable[[], float] = time,
    ):
        # what is given
        self._item_of = item_of
        self._window_chunks = window_chunks
        self._journal = journal
        self._clock = clock
        self._budget = limits.budget

        # the parts
        wanted = np.asarray(order, dtype=np.int64)
        self._stock = Stock(store, retention=retention, journal=journal)
        settled = self._stock.settled(wanted)
        self._table = LeaseTable(
            wanted, settled=settled, num_rows=self._stock.num_rows, budget=limits.budget
        )
        self._fleet = Fleet(
            backend, limits, compare=compare, give_back=self._table.give_back, wall=wall
        )
        self._progress = Progress(
            self._table, window_chunks=window_chunks, journal=journal, now=clock()
        )

        # what changes
        self._cursors: dict[str, int] = {}
        self._num_refused = 0  # publications that the store did not take, one after the other
        self._next_news = -np.inf

    def run(
        self,
        *,
        readers: Collection[str],
        coordinator: Inbox,
        finished: Callable[[], bool],
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Produce until every wanted chunk is published and `finished()`; or until `finished()` and
        `enough()`, since nobody waits for what is missing.

        `readers`: the students whose cursors on the coordinator move the window; without any,
        nothing holds the workers back. Raises TeacherError where chunks or start-up checks fail too
        often, and at once what `finished` raises: a student that has failed never moves the window.
        """
        self._record_if_done()  # if there is nothing to make
        try:
            while not (finished() and (self._table.done or enough())):
                self._look_around(coordinator, self._clock())
                self._advance(limit=self._limit(readers))
            self._stock.finish()
        finally:
            self._fleet.release()

    def _look_around(self, coordinator: Inbox, now: float) -> None:
        """Take in what other processes report: through the coordinator, then through the store."""
        if now >= self._next_news:
            self._next_news = now + _NEWS_EVERY_S
            news = coordinator.read()
            self._cursors.update(news.cursors)
            self._fleet.hear(news.heard_teachers, now)
            self._replace_the_silent(now)
            self._table.reopen(*filter(self._stock.is_lost, news.bad_chunks))
            self._fleet.take_notices(news.notices, now)
        self._table.reopen(*self._stock.look(now))

    def _limit(self, readers: Collection[str]) -> int:
        """The first position in the reading order that must not be leased."""
        cursors = [self._cursors.get(reader, 0) for reader in readers]
        own = min(cursors, default=self._table.num_wanted)
        return self._stock.limit(own, self._window_chunks)

    def _advance(self, *, limit: int) -> None:
        """One round: staff the fleet, lease what may be leased, and take in answers for a
        moment."""
        now = self._clock()
        if self._table.done:
            self._fleet.release()  # the students can have the processors
        else:
            self._fleet.staff(self._table.num_wanted - self._table.num_settled, now)
        self._call_in_late_work(now)
        if self._fleet.begun:
            self._hand_out(limit, now)
        for worker, event in self._fleet.events(timeout_s=_POLL_S):
            self._take_in(worker, event)
        self._progress.look(self._clock(), limit=limit, num_ready=self._fleet.num_ready)

    def _hand_out(self, limit: int, now: float) -> None:
        """Lease work to workers with room, idle ones first; where no work is left, lease slow work
        a second time to idle ones."""
        for with_room in self._fleet.with_room:
            self._hand_out_to(with_room, partial(self._table.lease, limit=limit, now=now))
        self._hand_out_to(self._fleet.with_room[0], partial(self._table.hedge, now=now))

    def _hand_out_to(
        self, with_room: Mapping[int, Worker], lease_to: Callable[[int], Lease | None]
    ) -> None:
        """Lease to these workers until none of them has room, or there is nothing to lease."""
        while with_room and (lease := lease_to(next(iter(with_room)))) is not None:
            self._submit(lease)

    def _submit(self, lease: Lease) -> None:
        item = self._item_of(lease.chunk)
        if lease.left_out:
            item = item.without(lease.left_out)
        if lease.trial is not None:
            item = item.only(lease.trial)
        self._fleet.submit(lease, item)

    def _call_in_late_work(self, now: float) -> None:
        """Lease work that is past its deadline to other workers; give up a worker that then does
        not answer for as long again."""
        for lease in self._table.expire(now):
            self._fleet.note_late(lease, now)
        for worker in self._fleet.overdue(now):
            self._lose(worker, "it did not answer for two lease timeouts", blame=True)

    def _replace_the_silent(self, now: float) -> None:
        """End workers without heartbeats: the fleet starts others."""
        for worker, silent_s in self._fleet.silent(now):
            lease = worker.in_work
            phase = "start" if worker.node is None else "work"
            chunk = None if lease is None else lease.chunk
            self._journal.record(
                StallEvent(self._budget.words.worker, worker.number, 0, phase, silent_s, "", chunk)
            )
            self._die(worker, Died(worker.number, f"it gave no heartbeat for {silent_s:.0f} s"))

    def _take_in(self, worker: Worker, event: Event[ReadyT]) -> None:
        match event:
            case Started(ready=ready):
                self._fleet.welcome(worker, ready, self._clock())
                self._journal.record(ready.journal_event(worker.number))
            case Computed(lease=number):
                self._fleet.note_computed(worker, number)
            case Answered(lease=number, answer=answer):
                self._accept(worker, self._fleet.end(worker, number), answer)
            case Raised(lease=None, error=error):
                self._fail_to_start(worker, error)
            case Raised(lease=int(number), error=error):
                self._fail(worker, self._fleet.end(worker, number), error)
            case Died():
                self._die(worker, event)

    def _accept(self, worker: Worker, lease: Lease, answer: Answer) -> None:
        match answer:
            case Passed():
                self._report(self._table.passed(lease))
            case Found():
                self._table.find(lease)
                self._stock.published(lease.chunk)
            case _:
                self._num_refused = 0
                self._table.publish(lease, now=self._clock())
                self._stock.published(lease.chunk)
                self._progress.add(answer.num_tokens)
                self._journal.record(answer.journal_event(worker.number))
        self._record_if_done()

    def _fail(self, worker: Worker, lease: Lease, cause: BaseException) -> None:
        who, what = self._budget.words.worker, self._budget.words.block
        _log.info("%s %d failed at %s %d: %r", who, worker.number, what, lease.chunk, cause)
        if isinstance(cause, StoreUnavailable):  # the worker waited for the store as long as it may
            self._num_refused += 1
            if self._num_refused >= self._budget.max_failures * max(1, self._fleet.num_ready):
                raise cause
            self._table.give_back(lease)
            return
        if isinstance(cause, UserError):
            raise cause  # a store without permission, say: every other attempt would fail, too
        if not isinstance(cause, StillhouseError):
            # after an error on the GPU nothing works in that process any more
            self._fleet.retire(worker)
        self._report(self._table.fail(lease, f"{type(cause).__name__}: {cause}"))

    def _fail_to_start(self, worker: Worker, cause: BaseException) -> None:
        if not self._fleet.begun:  # every other worker would most likely fail in the same way
            if isinstance(cause, StillhouseError):
                raise cause
            raise TeacherError(
                f"a {self._budget.words.worker} could not start: {cause!r}"
            ) from cause
        self._die(worker, Died(worker.number, repr(cause)))

    def _die(self, worker: Worker, death: Died) -> None:
        """Take in that a worker is gone; the next round of the fleet replaces it."""
        _log.info("%s %d is gone: %s", self._budget.words.worker, worker.number, death.reason)
        announced = death.preempted or worker.leaves_at is not None
        if worker.node is None and not announced and not death.with_machine:
            self._fleet.lose_at_start(self._clock())
        self._lose(worker, death.reason, blame=not announced)
        self._fleet.require_starts(death.reason)

    def _lose(self, worker: Worker, reason: str, *, blame: bool) -> None:
        """End a worker that is lost. `blame`: what it had in work may have killed it."""
        lease = self._fleet.lose(worker)
        if lease is not None:
            self._report(self._table.lose(lease, reason, blame=blame))

    def _report(self, found: SetAside | None) -> None:
        if found is not None:
            num_rows, chunk, reason = len(found.rows), found.chunk, found.reason
            row, block = self._budget.words.row, self._budget.words.block
            _log.warning("%d %ss of %s %d are set aside: %s", num_rows, row, block, chunk, reason)
            sequences = self._stock.sequences(chunk, found.rows)
            self._journal.record(SetAsideEvent(chunk, sequences, reason))

    def _record_if_done(self) -> None:
        if self._table.done:
            self._progress.record(self._clock(), num_ready=self._fleet.num_ready)
