"""Who reads the store, and what follows for the teachers: how far ahead they may run, what nobody
needs, and what must be made again.

A chunk is deleted only when every registered reader, over all its epochs, has committed past its
last use of it; and only at a second look, so that a reader which joins meanwhile is seen. A chunk
that an own reader will read again and that is gone is made again.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import StoreError
from stillhouse.store import ChunkStore, Consumer, StoreUnavailable
from stillhouse.store.consumers import registered

_MOST_DELETED_AT_ONCE = 256  # a look must not take long


class Retention:
    """The registered readers of a store, of whom `own` are the students of this run.

    `done_after(reader)` says, for every chunk, after how many steps the reader will not read it any
    more; `position(reader)` how far it is in the order in which this run's teachers work, or None
    where it reads in another order, which says nothing about that.
    """

    def __init__(
        self,
        store: ChunkStore,
        *,
        own: Collection[str],
        deletes: bool,
        least_ahead: int,
        done_after: Callable[[Consumer], NDArray[np.int64]],
        position: Callable[[Consumer], int | None],
    ):
        self._store = store
        self._own = frozenset(own)
        self._deletes = deletes
        self._least_ahead = least_ahead
        self._done_after = done_after
        self._position = position
        self._readers: list[Consumer] = []
        self._plans: dict[str, tuple[Consumer, NDArray[np.int64]]] = {}
        self._there = np.zeros(store.recipe.num_chunks, dtype=bool)
        self._doomed = np.zeros(store.recipe.num_chunks, dtype=bool)
        self._went_back = False

    def begin(self, published: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Take in who reads, and what is there. Returns, for every chunk, whether this run's
        readers will read it (again).

        Raises StoreError where chunks are to be deleted and somebody reads whom this version does
        not understand.
        """
        self._there[published] = True
        self._readers, strangers = registered(self._store)
        if strangers and self._deletes:
            raise StoreError(
                f'store.retain is "until-read", but nobody knows which chunks {strangers[0]} in '
                f"{self._store.url} stands for: "
                'delete it if nobody reads there any more, or set store.retain = "all"'
            )
        return self._needed()

    def published(self, number: int) -> None:
        """The chunk is in the store."""
        self._there[number] = True

    def look(self) -> list[int]:
        """See how far the readers are; delete what they are all done with. Returns chunks to make
        again, for an own reader that went back.

        A store that does not answer is asked again at the next look.
        """
        try:
            found = registered(self._store)
            before = {
                reader.name: reader.committed_step
                for reader in self._readers
                if reader.name in self._own
            }
            self._went_back |= any(
                reader.committed_step < before.get(reader.name, 0) for reader in found.readers
            )
            self._readers = found.readers
            if self._deletes:
                self._delete(understood=not found.strangers)
            return self._missing() if self._went_back else []
        except StoreUnavailable:
            return []

    def finish(self) -> None:
        """The run is done: what it leaves to nobody goes at once. Whoever joins in this moment
        would have it made again."""
        self.look()
        self.look()

    def limit(self, own: int, window: int) -> int:
        """The first position that teachers must leave alone, where this run's slowest reader has
        finished `own` positions.

        Readers of other runs hold it back too while they are on their way, but never so far that an
        own one would wait for them.
        """
        others = [
            reader
            for reader in self._readers
            if reader.name not in self._own and 0 < reader.committed_step < reader.total_steps
        ]
        positions = [
            position for reader in others if (position := self._position(reader)) is not None
        ]
        return max(own + self._least_ahead, min([own, *positions]) + window)

    def _needed(self) -> NDArray[np.bool_]:
        own = [reader for reader in self._readers if reader.name in self._own]
        needed = np.full(len(self._there), not own)
        for reader in own:
            needed |= self._plan(reader) > reader.committed_step
        return needed

    def _missing(self) -> list[int]:
        """What an own reader will read again, and the store has not."""
        there = np.zeros_like(self._there)
        there[list(self._store.published())] = True
        self._there, self._went_back = there, False
        return [int(number) for number in np.flatnonzero(self._needed() & ~there)]

    def _delete(self, *, understood: bool) -> None:
        """Delete what everybody was done with at the last look, and is now."""
        all_known = understood and self._own <= {reader.name for reader in self._readers}
        done_with = self._there & all_known
        for reader in self._readers:
            done_with &= self._plan(reader) <= reader.committed_step
        doomed, self._doomed = self._doomed & done_with, done_with
        gone = np.flatnonzero(doomed)[:_MOST_DELETED_AT_ONCE]
        self._store.delete(*gone.tolist())
        self._there[gone] = self._doomed[gone] = False

    def _plan(self, reader: Consumer) -> NDArray[np.int64]:
        """`done_after`, computed once for as long as the reader's order stays what it is."""
        way = replace(reader, committed_step=0)
        known = self._plans.get(reader.name)
        if known is None or known[0] != way:
            known = self._plans[reader.name] = (way, self._done_after(way))
        return known[1]
