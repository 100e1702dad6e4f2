"""Retention: what the registered consumers of a store mean for a pool. They limit how far it may
run ahead, and say which chunks can be deleted and which must be made again.

A chunk is deleted only when every registered consumer, over all its epochs, has committed past its
last use of it; and only at a second look, so that a consumer that joins meanwhile is seen. A chunk
that a student of this run will read again and that is gone is made again.
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
    """The registered consumers of a store. `own` names those that are students of this run.

    `deletes`: chunks that no consumer needs are deleted. `least_ahead`: the chunks that an own
    student may need for its next step. `done_after(consumer)` is, for every chunk, the step after
    which the consumer does not read it any more; `position(consumer)` how far it is in the order in
    which this run's teachers work, None where it reads in another order.
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
        self._consumers: list[Consumer] = []
        # by name: `done_after` of a consumer, which is given beside it with no step committed
        self._uses: dict[str, tuple[Consumer, NDArray[np.int64]]] = {}
        self._there = np.zeros(store.recipe.num_chunks, dtype=bool)
        self._doomed = np.zeros(store.recipe.num_chunks, dtype=bool)
        self._went_back = False

    def begin(self, published: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Take in which chunks are published. Returns, for every chunk, whether this run's students
        will read it (again).

        Raises StoreError where chunks are to be deleted and a consumer is registered that this
        version does not understand.
        """
        self._there[published] = True
        self._consumers, strangers = registered(self._store)
        if strangers and self._deletes:
            raise StoreError(
                f'store.retain is "until-read", but it is unknown which chunks {strangers[0]} in '
                f"{self._store.url} needs: delete it if that consumer has ended, or set "
                'store.retain = "all"'
            )
        return self._needed()

    def published(self, number: int) -> None:
        """Note that the chunk is in the store."""
        self._there[number] = True

    def look(self) -> list[int]:
        """See how far the consumers are, and delete what they are all done with. Returns chunks to
        make again, for an own student that went back.

        A store that does not answer is looked at again the next time.
        """
        try:
            before = {each.name: each.committed_step for each in self._own_consumers()}
            self._consumers, strangers = registered(self._store)
            self._went_back |= any(
                each.committed_step < before.get(each.name, 0) for each in self._consumers
            )
            if self._deletes:
                self._delete(understood=not strangers)
            return self._missing() if self._went_back else []
        except StoreUnavailable:
            return []

    def finish(self) -> None:
        """Delete at once what no consumer needs after the run. A chunk that a consumer wants which
        joins at this moment would be made again."""
        self.look()
        self.look()

    def limit(self, own: int, window: int) -> int:
        """The first position in the reading order that teachers must leave alone. `own`: the
        positions that this run's slowest student has finished.

        Consumers of other runs hold teachers back too while they read, but never so far that an own
        student would wait for them.
        """
        others = [
            self._position(each)
            for each in self._consumers
            if each.name not in self._own and 0 < each.committed_step < each.total_steps
        ]
        slowest = min([own, *(position for position in others if position is not None)])
        return max(own + self._least_ahead, slowest + window)

    def _own_consumers(self) -> list[Consumer]:
        return [each for each in self._consumers if each.name in self._own]

    def _needed(self) -> NDArray[np.bool_]:
        """For every chunk, whether an own student will read it; all, where none is registered."""
        own = self._own_consumers()
        needed = np.full(len(self._there), not own)
        for each in own:
            needed |= self._uses_of(each) > each.committed_step
        return needed

    def _missing(self) -> list[int]:
        """The chunks that an own student will read again and the store does not have."""
        there = np.zeros_like(self._there)
        there[list(self._store.published())] = True
        self._there, self._went_back = there, False
        return np.flatnonzero(self._needed() & ~self._there).tolist()

    def _delete(self, *, understood: bool) -> None:
        """Delete the chunks that all consumers were done with at the last look, and are now."""
        all_known = understood and self._own <= {each.name for each in self._consumers}
        done_with = self._there & all_known
        for each in self._consumers:
            done_with &= self._uses_of(each) <= each.committed_step
        doomed, self._doomed = self._doomed & done_with, done_with
        gone = np.flatnonzero(doomed)[:_MOST_DELETED_AT_ONCE]
        self._store.delete(*gone.tolist())
        self._there[gone] = self._doomed[gone] = False

    def _uses_of(self, consumer: Consumer) -> NDArray[np.int64]:
        """`done_after`, computed once for as long as the consumer's order stays what it is."""
        order = replace(consumer, committed_step=0)
        known = self._uses.get(consumer.name)
        if known is None or known[0] != order:
            known = self._uses[consumer.name] = (order, self._done_after(order))
        return known[1]
