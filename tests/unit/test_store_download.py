"""A download is the object's bytes in order, held a few ranges at a time, whatever single answers
are like."""

import threading
from collections.abc import Iterator

import pytest

from stillhouse.store import StoreUnavailable
from stillhouse.store.download import Answer, download

DATA = bytes(range(251)) * 40
RANGE_BYTES, IN_FLIGHT = 1000, 3


class Shop:
    """Answers for ranges of DATA. `cuts` are lengths after which its next answers end, with an
    error or without."""

    def __init__(self, cuts: list[int] | None = None, *, with_error: bool = True) -> None:
        self.asked: list[tuple[int, int]] = []
        self.cuts, self._with_error = cuts or [], with_error
        self._lock = threading.Lock()

    def open_range(self, start: int, end: int) -> Answer:
        with self._lock:
            self.asked.append((start, end))
            cut = self.cuts.pop(0) if self.cuts else None
        return Answer(len(DATA), self._body(memoryview(DATA)[start:end], cut))

    def _body(self, whole: memoryview, cut: int | None) -> Iterator[memoryview]:
        part = whole if cut is None else whole[:cut]
        for start in range(0, len(part), 300):
            yield part[start : start + 300]
        if cut is not None and self._with_error:
            raise StoreUnavailable("the connection broke")


def downloaded(shop: Shop) -> bytes:
    return b"".join(download(shop.open_range, range_bytes=RANGE_BYTES, in_flight=IN_FLIGHT))


@pytest.mark.parametrize("with_error", [True, False])
def test_each_range_goes_on_where_it_broke_off(with_error: bool) -> None:
    shop = Shop([600, 250, 100, 10], with_error=with_error)
    assert downloaded(shop) == DATA
    assert len(shop.asked) == 11 + 4
    assert sum(end - start for start, end in shop.asked) < len(DATA) + RANGE_BYTES + 4 * RANGE_BYTES
    assert (600, 1000) in shop.asked


def test_an_answer_that_breaks_off_after_its_last_byte_is_whole() -> None:
    assert downloaded(Shop([1000])) == DATA


@pytest.mark.parametrize("with_error", [True, False])
def test_a_range_of_which_nothing_comes_is_given_up(with_error: bool) -> None:
    shop = Shop([600, 0], with_error=with_error)
    with pytest.raises(
        StoreUnavailable,
        match="the connection broke" if with_error else "the bytes from 600 to 1000 was empty",
    ):
        downloaded(shop)


def test_an_answer_that_goes_on_after_its_range_is_not_swallowed() -> None:
    def endless(_start: int, _end: int) -> Answer:
        return Answer(len(DATA), more())

    def more() -> Iterator[memoryview]:
        while True:
            yield memoryview(DATA)

    with pytest.raises(StoreUnavailable, match="goes on after them"):
        list(download(endless, range_bytes=RANGE_BYTES))


def test_no_more_ranges_are_asked_for_than_may_be_held() -> None:
    shop = Shop()
    pieces = download(shop.open_range, range_bytes=RANGE_BYTES, in_flight=IN_FLIGHT)
    taken = 0
    for piece in pieces:
        taken += len(piece)
        assert len(shop.asked) <= taken // RANGE_BYTES + IN_FLIGHT
    assert taken == len(DATA)
