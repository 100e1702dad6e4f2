"""The backlog: open chunks in the order in which students first read them; returned work comes
first.

Memory: one byte a chunk, and the work that was returned.
"""

import heapq
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_WHOLE = -1


class Work(NamedTuple):
    """A chunk, by its position in the reading order; or one row of it, on trial."""

    position: int
    row: int = _WHOLE

    @property
    def is_whole(self) -> bool:
        return self.row == _WHOLE


class Backlog:
    """`order` names the wanted chunks in reading order, `settled` which positions of it need no
    work."""

    def __init__(self, order: Sequence[int] | NDArray[np.int64], *, settled: NDArray[np.bool_]):
        self._order = np.asarray(order, dtype=np.int64)
        self._settled = bytearray(settled.astype(np.uint8).tobytes())
        self.num_settled = int(settled.sum())
        self._frontier = 0  # no position from here on has ever been taken
        # a heap of (position, weight against it, row); `_waiting` says which are still valid
        self._returned: list[tuple[int, int, int]] = []
        self._waiting: set[Work] = set()

    def __len__(self) -> int:
        return len(self._order)

    def chunk(self, position: int) -> int:
        return int(self._order[position])

    def is_settled(self, position: int) -> bool:
        return bool(self._settled[position])

    def settle(self, position: int) -> None:
        """Mark an open position as one that needs no work."""
        self._settled[position] = 1
        self.num_settled += 1

    def reopen(self, numbers: Collection[int]) -> list[int]:
        """Have these chunks made again. Returns the positions that were settled until now; the
        others are open already, or not wanted."""
        settled = np.frombuffer(bytes(self._settled), dtype=bool)
        positions = np.flatnonzero(np.isin(self._order, [*numbers]) & settled).tolist()
        for position in positions:
            self._settled[position] = 0
            if position < self._frontier:
                self.put_back(Work(position), weight=0)
        self.num_settled -= len(positions)
        return positions

    def next(self) -> Work | None:
        """The first work in reading order; of the rows of a chunk, the one with the least against
        it. None where all work is taken."""
        while (returned := self._first_returned()) and returned not in self._waiting:
            heapq.heappop(self._returned)
        # -1, for none, becomes the end
        self._frontier = self._settled.find(0, self._frontier) % (len(self._order) + 1)
        if returned and returned.position < self._frontier:
            return returned
        return Work(self._frontier) if self._frontier < len(self._order) else None

    def take(self, work: Work) -> None:
        """Take out what `next` returned."""
        if work in self._waiting:
            self._waiting.remove(work)
            heapq.heappop(self._returned)
        else:
            self._frontier = work.position + 1

    def put_back(self, work: Work, *, weight: int) -> None:
        """Return open work that was taken."""
        self._waiting.add(work)
        heapq.heappush(self._returned, (work.position, weight, work.row))

    def discard(self, work: Work) -> None:
        """Forget work that is not wanted any more."""
        self._waiting.discard(work)

    def _first_returned(self) -> Work | None:
        if not self._returned:
            return None
        position, _, row = self._returned[0]
        return Work(position, row)
