"""A call that may take no more than its share of memory and time, and raise nothing but what it
promises."""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import thread_time
from typing import TypeVar

_Answer = TypeVar("_Answer")

MOST_S = 1.0  # of this thread's time on a processor: what others do on the machine does not count
MOST_BYTES = 16 << 20  # files are read some MiB at a time
MOST_BYTES_PER_BYTE = 64  # of what is parsed: small values take that much as Python's objects
MOST_CHARACTERS_OF_WORDS = 20_000


class Broken(AssertionError):
    """A promise about what a parser does with any bytes is broken."""


@contextmanager
def measured_memory() -> Iterator[None]:
    """Needed around `bounded`; beginning to measure takes longer than most calls."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def bounded(
    call: Callable[[], _Answer], *, num_bytes: int, refusal: type[Exception] | tuple[()] = ()
) -> _Answer | None:
    """The answer, or None where it is refused with exactly this error. Raises Broken on any other,
    and on what takes too much."""
    tracemalloc.clear_traces()
    before, began = tracemalloc.get_traced_memory()[0], thread_time()
    try:
        answer = call()
    except Exception as error:
        if type(error) is not refusal:
            raise Broken(f"{type(error).__name__}: {str(error)[:300]}") from error
        answer = None
        if len(str(error)) > MOST_CHARACTERS_OF_WORDS:
            raise Broken(f"{len(str(error))} characters of words: {str(error)[:300]}") from error
    seconds, grown = thread_time() - began, tracemalloc.get_traced_memory()[1] - before
    if seconds > MOST_S:
        raise Broken(f"it took {seconds:.2f} s")
    if grown > MOST_BYTES + MOST_BYTES_PER_BYTE * num_bytes:
        raise Broken(f"it took {grown} bytes of memory for {num_bytes} bytes")
    return answer
