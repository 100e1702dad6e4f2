"""Which objects of a recipe cannot be read, in words: those that are not there, and those that are
known to be damaged."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice, pairwise
from typing import Any

from stillhouse.store.numbered import NumberedStore

_MOST_RANGES = 12
_QUARANTINED = re.compile(r"/quarantine/(\d{10})-")


def unreadable(
    store: NumberedStore[Any], num_objects: int, *, why_missing: str, cure: str
) -> dict[str, str]:
    """The rows `not there` and `damaged` of a recipe that has so many objects."""
    listing = store.listing()
    damaged = sorted(
        number
        for number in (listing.cut | _quarantined(store)) - listing.published
        if number < num_objects
    )
    known = sorted(number for number in listing.published.union(damaged) if number < num_objects)
    num_others = num_objects - len(known)
    words = {
        "not there": "none",
        "damaged": "none known: `stillhouse store verify` reads every byte",
    }
    if num_others:
        words["not there"] = f"{_ranges(_gaps(known, num_objects), num_others)}: {why_missing}"
    if damaged:
        words["damaged"] = f"{_ranges(_runs(damaged), len(damaged))}: {cure}"
    return words


def _quarantined(store: NumberedStore[Any]) -> set[int]:
    """The numbers of the objects that were moved aside."""
    matches = (
        _QUARANTINED.search(blob.key) for blob in store.blobs.under(f"{store.folder}/quarantine")
    )
    return {int(match[1]) for match in matches if match}


def _gaps(numbers: Sequence[int], end: int) -> Iterator[tuple[int, int]]:
    """The runs of numbers from 0 to `end` that are not among these ascending ones, each as its
    first and last."""
    for before, after in pairwise((-1, *numbers, end)):
        if before + 1 < after:
            yield before + 1, after - 1


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The runs of ascending numbers, each as its first and last."""
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], run[-1]


def _ranges(runs: Iterable[tuple[int, int]], num_all: int) -> str:
    """Runs of numbers as '3, 7-9', cut after some. `num_all` is how many numbers they hold."""
    shown = [
        str(first) if first == last else f"{first}-{last}"
        for first, last in islice(runs, _MOST_RANGES + 1)
    ]
    return ", ".join(shown[:_MOST_RANGES]) + (
        f" and more: {num_all:,} in all" if len(shown) > _MOST_RANGES else ""
    )
