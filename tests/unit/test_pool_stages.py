"""A teacher computes one chunk while it publishes the one before it, and holds two at most."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from stillhouse.pool.stages import TwoStages

PATIENCE_S = 60


def in_two_threads(
    compute: Callable[[int], int], publish: Callable[[int], int], *, num_items: int
) -> list[int | BaseException]:
    """What became of each item."""
    stages = TwoStages(compute, publish)
    with ThreadPoolExecutor(1) as computing, ThreadPoolExecutor(1) as publishing:
        firsts = [computing.submit(stages.first, item) for item in range(num_items)]
        seconds = [publishing.submit(stages.second) for _ in range(num_items)]
        for each in firsts:
            each.result(timeout=PATIENCE_S)
        return [each.exception(timeout=PATIENCE_S) or each.result() for each in seconds]


def test_an_item_is_computed_while_the_one_before_it_is_published() -> None:
    """Neither goes on before the other has begun; the last one has no successor."""
    meetings = [threading.Barrier(2, timeout=PATIENCE_S) for _ in range(3)]

    def compute(item: int) -> int:
        if item > 0:
            meetings[item - 1].wait()
        return item

    def publish(item: int) -> int:
        if item < len(meetings):
            meetings[item].wait()
        return 10 * item

    assert in_two_threads(compute, publish, num_items=4) == [0, 10, 20, 30]


def test_one_more_item_is_computed_while_publishing_lasts_and_then_none() -> None:
    num_items, computed, changed = 8, list[int](), threading.Condition()

    def compute(item: int) -> int:
        with changed:
            computed.append(item)
            changed.notify_all()
        return item

    def publish(item: int) -> int:
        with changed:
            most = min(item + 2, num_items)
            assert changed.wait_for(lambda: len(computed) >= most, timeout=PATIENCE_S)
            return len(computed) - item

    assert in_two_threads(compute, publish, num_items=num_items) == [2] * 7 + [1]


def test_an_error_is_told_of_the_item_that_it_belongs_to_and_the_others_go_on() -> None:
    def compute(item: int) -> int:
        if item == 1:
            raise ValueError("no such id")
        return item

    def publish(item: int) -> int:
        if item == 3:
            raise OSError("the store is away")
        return item

    zero, first, second, third, fourth = in_two_threads(compute, publish, num_items=5)
    assert [zero, second, fourth] == [0, 2, 4]
    with pytest.raises(ValueError, match="no such id"):
        raise_it(first)
    with pytest.raises(OSError, match="the store is away"):
        raise_it(third)


def raise_it(found: int | BaseException) -> None:
    assert isinstance(found, BaseException)
    raise found
