"""What verification finds of one object of a store."""

from typing import NamedTuple


class Finding(NamedTuple):
    """What verification found of one object: `problem` is None where all is well."""

    key: str
    number: int | None  # of the chunk or the shard, where it is one
    problem: str | None
