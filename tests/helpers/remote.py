"""Functions that tests have called in other processes: workers can import this module, and not a
test's."""

import os
import signal

from stillhouse.store import ChunkMissing


def join(*words: str) -> tuple[str, int]:
    """The words in one line, and the process that joined them."""
    return " ".join(words), os.getpid()


def refuse(message: str) -> None:
    """Raise an error of ours."""
    raise ChunkMissing(message)


def trip(message: str) -> None:
    """Raise an error that is none of ours."""
    raise KeyError(message)


def die() -> None:
    """Let the process be killed."""
    os.kill(os.getpid(), signal.SIGKILL)
