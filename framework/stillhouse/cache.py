"""Errors of the cache directory: where it cannot be written, and how to have it on another disk."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillhouse.errors import CacheError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing_cache(cache_dir: Path) -> Iterator[None]:
    """A block that writes below `cache_dir` alone. Raises CacheError in place of any OSError."""
    try:
        yield
    except OSError as error:
        raise unwritable(cache_dir, error) from error


def unwritable(cache_dir: Path, error: OSError) -> CacheError:
    """The error to raise where a write below `cache_dir` failed."""
    is_full = is_no_room(error)
    cure = "make room on that disk" if is_full else "make it a directory that you may write into"
    return CacheError(
        f"the cache {cache_dir} cannot be written: {error.strerror or error}; {cure}, or set "
        "XDG_CACHE_HOME to a directory elsewhere: the cache is then its subdirectory stillhouse"
    )


def is_no_room(error: OSError) -> bool:
    """Whether a disk or a quota is full. `datasets` checks the room itself, and its error has no
    errno but a sentence."""
    return error.errno in _NO_ROOM or (error.errno is None and "disk space" in str(error))
