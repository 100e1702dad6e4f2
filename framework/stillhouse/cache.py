"""The cache directory where it cannot be written: which disk that is, and how to have the cache on
another."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillhouse.errors import CacheError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing_cache(cache_dir: Path) -> Iterator[None]:
    """A block that works below `cache_dir` alone. Raises CacheError in place of any OSError."""
    try:
        yield
    except OSError as error:
        raise unwritable(cache_dir, error) from error


def unwritable(cache_dir: Path, error: OSError) -> CacheError:
    """What to say of an error that a write below `cache_dir` has met."""
    cure = (
        "make room on that disk"
        if is_no_room(error)
        else "make it a directory that you may write into"
    )
    return CacheError(
        f"the cache {cache_dir} cannot be written: {error.strerror or error}; {cure}, or set "
        "XDG_CACHE_HOME to a directory elsewhere:"
        " the cache is then its subdirectory stillhouse"
    )


def is_no_room(error: OSError) -> bool:
    """Whether a disk or a quota is full. `datasets` looks for room itself, and then gives no number
    but a sentence."""
    return error.errno in _NO_ROOM or (error.errno is None and "disk space" in str(error))
