"""A thread that follows what grows: a journal, or the log files of other processes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def followed(look: Callable[[], None], *, every_s: float, name: str) -> Iterator[None]:
    """Call `look` from a thread of this name every so often, and once more when the block is
    left."""
    stopped = threading.Event()

    def follow() -> None:
        is_last = False
        while not is_last:
            is_last = stopped.wait(every_s)
            look()

    thread = threading.Thread(target=follow, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
