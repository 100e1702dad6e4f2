"""Downloading an object of any size by ranges: several are in flight, each is continued where its
answer broke off, and memory is bounded.

No request takes as long as the whole object, so a limit on the time of one request is no limit on
the size of an object.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from stillhouse.errors import StoreUnavailable

RANGE_BYTES, RANGES_IN_FLIGHT = 16 << 20, 8  # 128 MiB at one time


class Answer(NamedTuple):
    """What the store answers to a request for a range."""

    object_bytes: int  # of the whole object
    body: Iterable[memoryview]  # may end early, or raise StoreUnavailable after some of it


OpenRange = Callable[[int, int], Answer]  # (start, end), which may lie behind the object's end


def download(
    open_range: OpenRange, *, range_bytes: int = RANGE_BYTES, in_flight: int = RANGES_IN_FLIGHT
) -> Iterator[memoryview]:
    """The pieces of an object, in order. Holds at most `in_flight` ranges at one time.

    Raises StoreUnavailable once a request for the rest of a range brings nothing at all.
    """
    # the first range, which also gives the size
    object_bytes, pieces = _whole_range(open_range, 0, range_bytes)
    starts = iter(range(range_bytes, object_bytes, range_bytes))
    in_order: deque[Future[tuple[int, list[memoryview]]]] = deque()
    pool = ThreadPoolExecutor(in_flight, thread_name_prefix="download")

    def request_next() -> None:
        if (start := next(starts, None)) is not None:
            end = min(start + range_bytes, object_bytes)
            in_order.append(pool.submit(_whole_range, open_range, start, end))

    # the others, requested ahead and yielded in order
    try:
        for _ in range(in_flight - 1):  # the range that is being yielded is in memory as well
            request_next()
        yield from pieces
        while in_order:
            pieces = in_order.popleft().result()[1]
            yield from pieces
            pieces.clear()
            request_next()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _whole_range(open_range: OpenRange, start: int, end: int) -> tuple[int, list[memoryview]]:
    """The object's size, and the range's bytes, as far as the object goes. An answer that breaks
    off is continued; raises StoreUnavailable on one that brings nothing, or too much."""
    pieces: list[memoryview] = []
    at = start
    while True:
        # one request for what is left of the range
        before, problem = at, None
        try:
            object_bytes, body = open_range(at, end)
            end = min(end, object_bytes)
            for piece in body:
                pieces.append(piece)
                at += len(piece)
                if at > end:
                    break
        except StoreUnavailable as error:
            problem = error
        # too much, all of it, or nothing: otherwise another request
        if at > end:
            raise StoreUnavailable(
                f"the answer to a request for the bytes up to {end} goes on after them; try again"
            )
        if at == end:
            return object_bytes, pieces
        if at == before:
            raise problem or StoreUnavailable(
                f"the answer to a request for the bytes from {at} to {end} was empty; try again"
            )
