"""`Backend`: the name of the implementation that does a piece of work, and the reason for it."""

from typing import NamedTuple


class Backend(NamedTuple):
    """A choice among implementations, as journals and benchmarks show it."""

    name: str
    reason: str
