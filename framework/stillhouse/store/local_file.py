"""Reading one file of a store in a local directory. Raises OSError, as the system does, and
NotAFileError."""

import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from stillhouse.store.explain import NotAFileError

_PIECE_BYTES = 2 << 20  # more does not fit into a cache, and holds the interpreter's lock


def size_and_time(path: Path) -> tuple[int, datetime]:
    """Of the file that a link leads to, or of the link where it leads to none. Raises
    FileNotFoundError where neither is there. Nothing is opened: a named pipe would never open."""
    try:
        found = path.stat()
    except FileNotFoundError:
        found = path.lstat()
    return found.st_size, datetime.fromtimestamp(found.st_mtime, UTC)


def require_file(path: Path) -> None:
    """Raise NotAFileError where something else is there: to open a named pipe might never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise NotAFileError(f"{path} is a link to nothing") from None
        raise
    if not stat.S_ISREG(mode):
        raise NotAFileError(f"{path} is no file")


def pieces_of(path: Path) -> Iterator[memoryview]:
    """A whole file, some MiB at a time. obstore's own stream is thirty times slower."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield memoryview(piece)


def start_of(path: Path, num_bytes: int) -> tuple[memoryview, int]:
    """The first bytes of a file, and its size. obstore takes several times as long, and a listing
    does this for every chunk."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        # no more than there is, because memory is taken for all that `read` is given
        return memoryview(file.read(min(num_bytes, size))), size
