"""splitmix64 gives the published numbers, in NumPy and in torch."""

import numpy as np
import torch

from stillhouse.seeded import GOLDEN, shifted, splitmix64

# The first outputs of the reference implementation (https://prng.di.unimi.it/splitmix64.c) from the
# state 1234567.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def test_the_stream_of_a_seed_is_the_published_one_in_numpy_and_in_torch() -> None:
    places = 1234567 + GOLDEN * np.arange(1, 6, dtype=np.int64)
    ours = splitmix64(places)
    assert ours.view(np.uint64).tolist() == PUBLISHED
    assert splitmix64(torch.from_numpy(places)).tolist() == ours.tolist()


def test_a_shift_is_one_of_the_unsigned_number() -> None:
    x = [-1, -(2**63), 2**63 - 1, 5]
    wanted = [(value % 2**64) >> 11 for value in x]
    assert shifted(np.array(x, np.int64), 11).tolist() == wanted
    assert shifted(torch.tensor(x), 11).tolist() == wanted
