"""Draws from what is not kept of a distribution: ids whose mean is the tail itself, and the same ids whoever draws them again.

Shapes: T tokens, N draws, V vocabulary.

One id is drawn in each of N equal shares of the tail's mass, laid out in the order of ids. So the expected number of draws of an id is N
times its probability within the tail, as with N independent draws, and the variance of whatever is averaged over them is never larger
(stratified sampling; Cochran 1977, "Sampling Techniques", chapter 5). With no kept entries that is what RS-KD asks of its draws (arXiv
2503.16870, section 4): an unbiased target.

Masses are whole numbers, so their sums are exact in any order: how the work is cut into blocks, or into the lanes of a device, decides
nothing. Randomness is a hash of a seed for each token, which the teacher derives from the recipe and the token's place in the corpus.
"""

import torch
from torch import Tensor

_ONE = 2.0**40  # the whole number that stands for the tail's greatest mass; 2^22 of these still fit into an int64
_BELOW_ONE = 1.0 - 2.0**-53  # the double before 1: times a number, and rounded, it is still less than that number
_GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, as an int64, like the two below
_FIRST_FACTOR = -0x40A7B892E31B1A47
_SECOND_FACTOR = -0x6B2FB644ECCEEE15


def token_seeds(seed: int, sequences_T: Tensor, columns_T: Tensor) -> Tensor:
    """int64 [T]: a seed for each token from that of the recipe (a signed 64-bit number) and the token's place: its sequence's number in
    the corpus, and its column there. The same on every machine."""
    of_sequence_T = _mix(seed + _GOLDEN * (sequences_T.long() + 1))
    return _mix(of_sequence_T + _GOLDEN * (columns_T.long() + 1))


def draw(logits_TV: Tensor, seeds_T: Tensor, *, num_draws: int) -> Tensor:
    """int32 [T, N] ids of softmax(logits), ascending, with repeats. An id whose logit is -inf, as that of a kept one, is never drawn.

    Mass below 2^-40 of the greatest in its row counts as none. A row of nothing but -inf gets N times V, which is no id.
    """
    peak_T1 = logits_TV.amax(dim=1, keepdim=True).clamp(min=torch.finfo(logits_TV.dtype).min)
    up_to_TV = (logits_TV - peak_T1).exp_().mul_(_ONE).long().cumsum_(dim=1)
    shares_TN = (torch.arange(num_draws, device=logits_TV.device) + _uniforms(seeds_T, num_draws)) / num_draws
    places_TN = (shares_TN.clamp_(max=_BELOW_ONE) * up_to_TV[:, -1:]).long()
    return torch.searchsorted(up_to_TV, places_TN, right=True, out_int32=True)


def _uniforms(seeds_T: Tensor, num_draws: int) -> Tensor:
    """float64 [T, N] in [0, 1), of 53 random bits each."""
    index_N = torch.arange(1, num_draws + 1, device=seeds_T.device)
    return _shifted(_mix(seeds_T[:, None] + _GOLDEN * index_N), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """The output function of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), on int64."""
    x = (x ^ _shifted(x, 30)) * _FIRST_FACTOR
    x = (x ^ _shifted(x, 27)) * _SECOND_FACTOR
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of the unsigned number that the int64 stands for."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
