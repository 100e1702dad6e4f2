"""`TwoStages`: an item is computed while the one before it is published (a pipeline of two stages),
so that a GPU does not wait for uploads."""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Semaphore
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")
_Answer = TypeVar("_Answer")

PUBLISHING = "publishing"  # Ray's name for an actor's second thread

_MOST_IN_MEMORY = 2  # one is being published; one is computed, or waits


class TwoStages(Generic[_Item, _Made, _Answer]):
    """Calls `compute` in one thread and `publish` in another, on the same items in the same order.

    One thread calls `first` with each item, the other calls `second` as many times. While `publish`
    takes its time, one more item is computed, and then `first` waits.
    """

    def __init__(
        self, compute: Callable[[_Item], _Made], publish: Callable[[_Made], _Answer]
    ) -> None:
        self._compute, self._publish = compute, publish
        self._made: SimpleQueue[Future[_Made]] = SimpleQueue()
        self._room = Semaphore(_MOST_IN_MEMORY)

    def first(self, item: _Item) -> None:
        """Compute the item for `second`, which raises what this raises."""
        self._room.acquire()
        made: Future[_Made] = Future()
        try:
            made.set_result(self._compute(item))
        except Exception as error:
            made.set_exception(error)
        self._made.put(made)

    def second(self) -> _Answer:
        """Wait for the next item that `first` has computed, and publish it."""
        try:
            return self._publish(self._made.get().result())
        finally:
            self._room.release()
