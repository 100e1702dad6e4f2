"""Ctrl-C, heard even where a library loses the exception: Ray's client may, while it calls again for an actor that has died."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def kept_interrupts() -> Iterator[Callable[[], None]]:
    """While the block lasts, SIGINT raises KeyboardInterrupt as always, and so does what is yielded from then on. Main thread only.

    Where SIGINT does something else, as in the background of a shell, it goes on doing that.
    """
    num_received = 0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal num_received
        num_received += 1
        signal.default_int_handler(number, frame)

    def require_none() -> None:
        if num_received:
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield require_none
        return
    signal.signal(signal.SIGINT, receive)
    try:
        yield require_none
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
