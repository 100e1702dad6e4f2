"""Which chunk is made next: a pure state machine over chunk numbers, without Ray and without a clock.

Every wanted chunk is waiting, leased or published. Chunks are leased in the order in which the students first read them, and only
within a window of that order, so that teachers never run further ahead of the slowest reader than the window allows.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Sequence

from stillhouse.errors import TeacherError

_LOSSES_PER_FAILURE = 3  # a lost machine is seldom the chunk's fault, so it weighs less than an attempt that raised


class LeaseTable:
    """`order` names the wanted chunks in reading order; `published` those that the store already has."""

    def __init__(self, order: Sequence[int], *, published: Collection[int], max_failures: int):
        self._position = {number: position for position, number in enumerate(order)}
        self._order = order
        self._waiting = [position for position, number in enumerate(order) if number not in published]
        self._leased: set[int] = set()
        self._failures: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._max_failures = max_failures

    @property
    def num_wanted(self) -> int:
        return len(self._order)

    @property
    def num_published(self) -> int:
        return len(self._order) - len(self._waiting) - len(self._leased)

    @property
    def num_leased(self) -> int:
        return len(self._leased)

    @property
    def num_failures(self) -> int:
        return self._failures.total()

    @property
    def done(self) -> bool:
        return not self._waiting and not self._leased

    def lease(self, *, limit: int) -> int | None:
        """The next chunk whose position in the reading order is below `limit`, now leased; None where there is none to give."""
        if not self._waiting or self._waiting[0] >= limit:
            return None
        number = self._order[heapq.heappop(self._waiting)]
        self._leased.add(number)
        return number

    def held_back(self, *, limit: int) -> bool:
        """Whether work is waiting that only the window keeps from being leased."""
        return bool(self._waiting) and self._waiting[0] >= limit

    def publish(self, number: int) -> None:
        """The leased chunk is in the store."""
        self._leased.remove(number)

    def hand_back(self, number: int) -> None:
        """The lease ended because whoever held it was sent away."""
        self._leased.remove(number)
        heapq.heappush(self._waiting, self._position[number])

    def lose(self, number: int, reason: str) -> None:
        """The lease ended because its teacher died; of one chunk, 3 x `max_failures` such ends raise TeacherError.

        Teachers may die for ever, on machines that come and go. But one and the same chunk dies with them so often only if it kills them.
        """
        self._losses[number] += 1
        if self._losses[number] >= _LOSSES_PER_FAILURE * self._max_failures:
            raise TeacherError(
                f"chunk {number} was lost with its teacher {self._losses[number]} times, last with: {reason}. "
                "Every other published chunk is kept: see whether this one exhausts the memory of its teacher "
                "(teacher.batch_sequences, teacher.block_tokens), and run again to go on from here."
            )
        self.hand_back(number)

    def fail(self, number: int, reason: str) -> None:
        """An attempt at the chunk raised; after `max_failures` of them raises TeacherError."""
        self._failures[number] += 1
        if self._failures[number] >= self._max_failures:
            raise TeacherError(
                f"chunk {number} failed {self._failures[number]} times, last with: {reason}. "
                "Every other published chunk is kept: mend the cause and run again to go on from here."
            )
        self.hand_back(number)

    def reopen(self, number: int) -> bool:
        """A published chunk turned out damaged and has to be made again; False where that is already under way."""
        position = self._position.get(number)
        if position is None or number in self._leased or position in self._waiting:
            return False
        heapq.heappush(self._waiting, position)
        return True
