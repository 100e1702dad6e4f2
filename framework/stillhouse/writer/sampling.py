"""Sampling: one token from each row of logits, by a random number that is a function of the
sample's own seed and the token's place alone. So a sample does not depend on what is written beside
it, but for rounding.

Shapes: B samples side by side, V vocabulary.
"""

from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from stillhouse.errors import TeacherError
from stillhouse.seeded import GOLDEN, shifted, splitmix64

_FRACTION_BITS = 53  # of a double


class Drawn(NamedTuple):
    """A token of each row, and its log-probability under what it was drawn from."""

    ids_B: Tensor  # int64
    logprobs_B: Tensor  # float32


def seed_of(fingerprint: str, shard: int, prompt: int, sample: int) -> int:
    """The seed of a sample, an int64: a function of its recipe and its numbers."""
    name = f"{fingerprint} {shard} {prompt} {sample}"
    return xxhash.xxh3_64_intdigest(name.encode("ascii")) - (1 << 63)


def uniforms(seeds_B: Tensor, places_B: Tensor) -> Tensor:
    """Numbers from 0 to below 1, float64 [B], for the token at this place of each sample; all
    int64."""
    bits_B = splitmix64(seeds_B + (places_B + 1) * GOLDEN)
    return shifted(bits_B, 64 - _FRACTION_BITS).double() * 2.0**-_FRACTION_BITS


def draw(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float) -> Drawn:
    """A token of softmax(logits / temperature), among the likeliest ones that have the mass `top_p`
    together. The log-probability is that of this distribution: after temperature and top_p.

    Raises TeacherError where a row is no distribution.
    """
    # in doubles, so that the sum over a large vocabulary is exact enough to draw from
    masses_BV = torch.softmax(logits_BV.double() / temperature, dim=1)
    if not torch.isfinite(masses_BV.sum()):
        raise TeacherError(
            "the writer gives logits that are not finite; its weights are damaged, or need a wider "
            "dtype (float32 or bfloat16)"
        )

    # what is likely enough, in the order of its mass
    order_BV = None
    if top_p < 1:
        masses_BV, order_BV = masses_BV.sort(dim=1, descending=True, stable=True)
        before_BV = masses_BV.cumsum(dim=1) - masses_BV
        masses_BV = torch.where(before_BV < top_p, masses_BV, 0.0)

    # the token at which the sum of masses passes the random share of all
    sums_BV = masses_BV.cumsum(dim=1)
    all_B1 = sums_BV[:, -1:].clone()
    found_B1 = torch.searchsorted(sums_BV, uniforms_B[:, None] * all_B1, right=True)
    last_B1 = torch.searchsorted(sums_BV, all_B1)  # the last one with mass, for a share of all
    found_B1 = torch.minimum(found_B1, last_B1)
    logprobs_B1 = (masses_BV.gather(1, found_B1) / all_B1).log().clamp_max(0.0)
    ids_B1 = found_B1 if order_BV is None else order_BV.gather(1, found_B1)
    return Drawn(ids_B1[:, 0], logprobs_B1[:, 0].float())
