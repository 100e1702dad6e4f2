"""Which implementation does a piece of work, and why: for people to read, in journals and
benches."""

from typing import NamedTuple


class Backend(NamedTuple):
    """Its name, and the reason why it was chosen."""

    name: str
    reason: str
