"""A whole object of any size, read by ranges: several are in flight, each goes on where it broke
off, and memory stays bounded.

No request has to live for as long as the whole object takes, so no limit on one request is a limit
on the size of an object.
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
    object_bytes, pieces = _whole_range(open_range, 0, range_bytes)
    starts = iter(range(range_bytes, object_bytes, range_bytes))
    coming: deque[Future[tuple[int, list[memoryview]]]] = deque()
    pool = ThreadPoolExecutor(in_flight, thread_name_prefix="download")

    def ask_for_next() -> None:
        if (start := next(starts, None)) is not None:
            coming.append(
                pool.submit(_whole_range, open_range, start, min(start + range_bytes, object_bytes))
            )

    try:
        for _ in range(in_flight - 1):  # the one that is handed out is held as well
            ask_for_next()
        yield from pieces
        while coming:
            pieces = coming.popleft().result()[1]
            yield from pieces
            pieces.clear()
            ask_for_next()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _whole_range(open_range: OpenRange, start: int, end: int) -> tuple[int, list[memoryview]]:
    """The object's size, and the range's bytes, as far as the object goes."""
    pieces: list[memoryview] = []
    at = start
    while True:
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
