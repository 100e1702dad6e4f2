"""Settings of glibc's malloc for benchmarks: freed memory is kept while something is timed.

By default glibc returns every block above 32 MB to the system when it is freed, and pays the page
faults again when it is next taken. The time of a way with such temporaries would mostly be that of
the page faults, which a caller whose memory is reused does not have.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # the numbers of mallopt's parameters in glibc's malloc.h
_DEFAULT_TRIM_BYTES, _DEFAULT_MMAPS = 128 * 1024, 65536
_NEVER, _NONE = -1, 0

KEPT = "malloc was told to keep freed memory, so that few page faults are timed"
NOT_KEPT = (
    "malloc, which is not glibc's, did as it always does: a way with large temporaries may "
    "pay page faults"
)


@contextmanager
def freed_memory_kept() -> Iterator[str]:
    """Within, this process gives no freed memory back to the system. Yields KEPT, or NOT_KEPT where
    malloc cannot be told.

    Afterwards it gives back what it can at once, and later what it frees.
    """
    libc = ctypes.CDLL(None)
    mallopt, malloc_trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if (
        mallopt is None
        or malloc_trim is None
        or not (mallopt(_MMAP_MAX, _NONE) and mallopt(_TRIM_THRESHOLD, _NEVER))
    ):
        yield NOT_KEPT
        return
    try:
        yield KEPT
    finally:
        mallopt(_MMAP_MAX, _DEFAULT_MMAPS)
        mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_BYTES)
        malloc_trim(0)


@contextmanager
def freed_memory_kept_by_children() -> Iterator[None]:
    """The same for every process that is started within, in any language: glibc reads these
    variables as a process starts."""
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
