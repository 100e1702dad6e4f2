"""The order of a corpus: a permutation that is the same on every machine and in every year."""

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillhouse.seeded import GOLDEN, splitmix64


def shuffled_order(
    num_items: int, purpose: Literal["corpus", "sequence"], *, seed: int
) -> NDArray[np.int64]:
    """A permutation of a corpus's documents or sequences: int64 [num_items], a function of these
    arguments alone.

    Items are sorted by splitmix64 of their number and the seed. NumPy's permutations are not used,
    for they may change between its versions.
    """
    digest = hashlib.sha256(f"stillhouse {purpose} order {seed}".encode()).digest()
    start = int.from_bytes(digest[:8], "little", signed=True)
    mixed = splitmix64(np.arange(1, num_items + 1, dtype=np.int64) * GOLDEN + start)
    return np.argsort(mixed.view(np.uint64), kind="stable").astype(np.int64)
