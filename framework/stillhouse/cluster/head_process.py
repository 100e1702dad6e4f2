"""A liveness watch over the attached cluster's head, which interrupts the main thread once the head
is gone.

Ray's client ends the whole process without a message, a minute after the head (GCS) is gone, and at
its next large object once the raylet of its own machine is gone. The interrupt comes first, so that
blocks that are left by it can still write their records.
"""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType

from stillhouse.errors import HeadGoneError, StillhouseError

GONE = (
    "the cluster's head is gone, and the run's coordinator with it; everything committed "
    "stays, and the same command goes on from there"
)

_CONNECT_S = 5.0


class HeadIsGone(BaseException):
    """The interrupt, raised in the main thread. A BaseException, as KeyboardInterrupt is, so that
    no `except Exception` catches it."""


@contextmanager
def head_required(
    is_absent: Callable[[], bool], *, patience_s: float, look_every_s: float = 0.5
) -> Iterator[None]:
    """Interrupt the block with HeadGoneError once `is_absent` has held for `patience_s`. In another
    thread than the main one, nothing is watched."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over, gone, main = threading.Event(), threading.Event(), threading.get_ident()

    # a thread looks and signals, the main thread raises
    def watch() -> None:
        absent_since: float | None = None
        while not over.wait(look_every_s):
            absent_since = (absent_since or monotonic()) if is_absent() else None
            if absent_since is not None and monotonic() - absent_since >= patience_s:
                gone.set()
                signal.pthread_kill(main, signal.SIGUSR1)
                return

    def receive(_number: int, _frame: FrameType | None) -> None:
        if gone.is_set() and not over.is_set():
            over.set()
            raise HeadIsGone

    before = signal.signal(signal.SIGUSR1, receive)
    threading.Thread(target=watch, name="head", daemon=True).start()

    # the ways out of the block
    try:
        yield
    except HeadIsGone:
        raise HeadGoneError(GONE) from None
    except StillhouseError:
        raise
    except Exception as error:
        if gone.is_set() or is_absent():  # the error is a consequence of that
            raise HeadGoneError(GONE) from error
        raise
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, before if before is not None else signal.SIG_DFL)


def is_port_closed(host: str, port: int) -> bool:
    """Whether no process accepts connections there. A busy one does: its system accepts them."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError:
        return True
    return False


@contextmanager
def watched_socket(path: Path) -> Iterator[Callable[[], bool]]:
    """Keep a connection to the process that listens at a socket's path. Yields a function: whether
    that process is gone, by the state of the connection.

    A new connection for each look would fill the log of that process.
    """
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(_CONNECT_S)
        line.connect(str(path))
        line.setblocking(False)

        def is_gone() -> bool:
            try:
                return line.recv(1, socket.MSG_PEEK) == b""
            except BlockingIOError:
                return False
            except OSError:
                return True

        yield is_gone
