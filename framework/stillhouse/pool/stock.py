"""The stock: which of the wanted chunks the store has when a pool begins, and which have to be made
again."""

import logging
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.pool.retention import Retention
from stillhouse.store.numbered import Listing
from stillhouse.tracking import RepairEvent, Tracker

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0  # at the consumers, each an object in the store


class BlockStore(Protocol):
    """Where workers publish what they make of blocks; a ChunkStore is one, a RolloutStore
    another."""

    def listing(self) -> Listing: ...

    def exists(self, number: int) -> bool: ...

    def is_whole(self, number: int) -> bool: ...

    def quarantine(self, number: int) -> bool: ...

    def rows(self, number: int) -> range:
        """The numbers, among those of all blocks, of what a block has."""
        ...


class Stock:
    """A store as a pool sees it. `retention` knows its registered consumers; None: there are none,
    and no chunk is deleted."""

    def __init__(self, store: BlockStore, *, retention: Retention | None, journal: Tracker):
        self._store = store
        self._retention = retention
        self._journal = journal
        self._next_look = -np.inf

    def settled(self, order: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these chunks need no work: they are published, or no consumer reads them. Chunks
        that were cut off are put into quarantine."""
        found = self._store.listing()
        for number in sorted(found.cut.intersection(order.tolist())):
            if self._store.quarantine(number):
                self._journal.record(RepairEvent(number))
        published = np.fromiter(found.published, dtype=np.int64)
        settled = np.isin(order, published)
        if self._retention is not None:
            settled |= ~self._retention.begin(published)[order]
        return settled

    def num_rows(self, number: int) -> int:
        return len(self._store.rows(number))

    def sequences(self, number: int, rows: tuple[int, ...]) -> list[int]:
        """The numbers of these rows of a chunk in the corpus."""
        sequences = self._store.rows(number)
        return [sequences[row] for row in rows]

    def published(self, number: int) -> None:
        if self._retention is not None:
            self._retention.published(number)

    def is_lost(self, number: int) -> bool:
        """Whether a chunk that a student reported has to be made again. The store is looked at
        first: the report may be wrong, or the second of its kind."""
        if not self._store.exists(number):
            return True
        if not self._store.quarantine(number):
            return False
        _log.warning("chunk %d was damaged: it is in quarantine, and is made again", number)
        self._journal.record(RepairEvent(number))
        return True

    def look(self, now: float) -> list[int]:
        """See how far the consumers are, if it is time. Returns chunks to make again."""
        if self._retention is None or now < self._next_look:
            return []
        self._next_look = now + _LOOK_EVERY_S
        return self._retention.look()

    def limit(self, own: int, window_chunks: int) -> int:
        """The first position in the reading order that must not be leased: as `Retention.limit`."""
        if self._retention is None:
            return own + window_chunks
        return self._retention.limit(own, window_chunks)

    def finish(self) -> None:
        """Have what no consumer needs deleted at the end of the run."""
        if self._retention is not None:
            self._retention.finish()
