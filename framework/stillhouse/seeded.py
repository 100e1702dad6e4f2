"""Pseudo-random numbers as a function of a seed and an index alone (splitmix64): the same on every
machine, in NumPy and in torch.

They are computed in int64 that wraps around, which both libraries have. The bits are those of the
published algorithm, which is unsigned.
"""

from typing import Any, TypeVar

GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio; an int64, as are the two below
_FIRST_FACTOR = -0x40A7B892E31B1A47
_SECOND_FACTOR = -0x6B2FB644ECCEEE15

Numbers = TypeVar("Numbers")  # a NumPy array or a tensor of int64


def splitmix64(x: Numbers) -> Numbers:
    """The output function of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators"), elementwise."""
    mixed: Any = x
    mixed = (mixed ^ shifted(mixed, 30)) * _FIRST_FACTOR
    mixed = (mixed ^ shifted(mixed, 27)) * _SECOND_FACTOR
    finished: Numbers = mixed ^ shifted(mixed, 31)
    return finished


def shifted(x: Numbers, num_bits: int) -> Numbers:
    """x >> num_bits, where an int64 is read as an unsigned number."""
    values: Any = x
    kept: Numbers = (values >> num_bits) & ((1 << (64 - num_bits)) - 1)
    return kept
