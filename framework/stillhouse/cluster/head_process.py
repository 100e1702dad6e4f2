"""Whether the attached cluster's head lives. Where it does not, the main thread is interrupted: Ray
would wait, and end the process.

Ray's client ends the whole process without a word a minute after its head (GCS) is gone, and at its
next large object once the raylet of its own machine is. What has to be written down by then is
written by the block that is left on this exception.
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
    """Raised in the main thread, like KeyboardInterrupt: no `except Exception` on the way may take
    it for its own."""


@contextmanager
def required(
    is_absent: Callable[[], bool], *, patience_s: float, look_every_s: float = 0.5
) -> Iterator[None]:
    """Leave the block with HeadGoneError once `is_absent` has held for `patience_s`. Main thread
    only; elsewhere nothing is watched."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over, gone, main = threading.Event(), threading.Event(), threading.get_ident()

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
    thread = threading.Thread(target=watch, name="head", daemon=True)
    thread.start()
    try:
        yield
    except HeadIsGone:
        raise HeadGoneError(GONE) from None
    except StillhouseError:
        raise
    except Exception as error:
        if gone.is_set() or is_absent():  # whatever else failed, failed because of that
            raise HeadGoneError(GONE) from error
        raise
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, before if before is not None else signal.SIG_DFL)


def nobody_listens(host: str, port: int) -> bool:
    """Whether nobody takes connections there. A process that is only busy does: its system takes
    them."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError:
        return True
    return False


@contextmanager
def held_to(path: Path) -> Iterator[Callable[[], bool]]:
    """Keep a connection to the process that listens at a socket's path; yields whether it is gone,
    which its system tells.

    A new connection each time would fill the log of that process.
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
