"""What the store has of the wanted chunks: what is there when a pool begins, and what has to be
made again."""

import logging

import numpy as np
from numpy.typing import NDArray

from stillhouse.pool.retention import Retention
from stillhouse.store import ChunkStore
from stillhouse.tracking import RepairRow, Tracker

_log = logging.getLogger(__name__)

_READERS_EVERY_S = 5.0


class Stock:
    """A store in the eyes of a pool. `retention` knows its registered readers; without one nobody
    is known to read it."""

    def __init__(self, store: ChunkStore, *, retention: Retention | None, journal: Tracker):
        self._store = store
        self._retention = retention
        self._journal = journal
        self._next_look = -np.inf

    def settled(self, order: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these chunks need no work: they are published, or nobody reads them. Cut ones
        are put into quarantine."""
        found = self._store.listing()
        for number in sorted(found.cut.intersection(order.tolist())):
            if self._store.quarantine(number):
                self._journal.record(RepairRow(number))
        published = np.fromiter(found.published, dtype=np.int64)
        settled = np.isin(order, published)
        return (
            settled
            if self._retention is None
            else settled | ~self._retention.begin(published)[order]
        )

    def num_rows(self, number: int) -> int:
        return len(self._store.recipe.chunk_rows(number))

    def sequences(self, number: int, rows: tuple[int, ...]) -> list[int]:
        """The numbers of these rows of a chunk in the corpus."""
        sequences = self._store.recipe.chunk_rows(number)
        return [sequences[row] for row in rows]

    def published(self, number: int) -> None:
        if self._retention is not None:
            self._retention.published(number)

    def is_lost(self, number: int) -> bool:
        """A reader found the chunk damaged or gone. The store looks first: readers may err, and two
        may report the same one."""
        if not self._store.exists(number):
            return True
        if not self._store.quarantine(number):
            return False
        _log.warning("chunk %d was damaged: it lies in quarantine, and is made again", number)
        self._journal.record(RepairRow(number))
        return True

    def look(self, now: float) -> list[int]:
        """See now and then how far the readers are. Returns chunks to make again."""
        if self._retention is None or now < self._next_look:
            return []
        self._next_look = now + _READERS_EVERY_S
        return self._retention.look()

    def limit(self, own: int, window_chunks: int) -> int:
        """The first position that workers must leave alone, where this run's slowest reader has
        finished `own` positions.

        A reader of another run may hold it back too, though never so far that the readers of this
        one would lack what they need next.
        """
        return (
            own + window_chunks
            if self._retention is None
            else self._retention.limit(own, window_chunks)
        )

    def finish(self) -> None:
        """The run is done."""
        if self._retention is not None:
            self._retention.finish()
