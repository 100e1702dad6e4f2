"""Draws from the tail of a distribution: stratified, unbiased, and a function of the seed alone.

Shapes: T tokens, N draws, K kept entries, V vocabulary, M blocks of a row, B ids of a block.

1. Lay the tail's mass out in the order of ids, and cut it into N equal shares (strata).
2. In each share, draw one id in proportion to its mass there.

The expected number of draws of an id is N times its probability within the tail, as with N
independent draws, and no average over the draws has a larger variance (stratified sampling; Cochran
1977, "Sampling Techniques", chapter 5). Without kept entries this is random-sampled distillation
(RS-KD, arXiv 2503.16870, section 4): an unbiased target.

The random numbers are hashes of one seed for each token, from the recipe and the token's place in
the corpus: a token that is compressed again has the same draws.

`draw` looks at every id. `draw_in_blocks` finds the block in which a draw falls, from the block-max
filter's sums, and looks at that block alone: less work where draws are few. The two agree except
for draws within float32 rounding of the border between two ids.
"""

import torch
from torch import Tensor

from stillhouse.logits.topk.blockmax_torch import windows
from stillhouse.logits.topk.found import RawTopK
from stillhouse.seeded import GOLDEN, shifted, splitmix64

_ONE = 2.0**40  # the whole number for the greatest mass of a row; 2^22 of these fit into an int64
# The float64 before 1: a number times it, rounded, is still less than that number.
_BELOW_ONE = 1.0 - 2.0**-53
_LOGITS_AT_ONCE = 1 << 20  # `draw` has an int64 of mass for each


def token_seeds(seed: int, sequences_T: Tensor, columns_T: Tensor) -> Tensor:
    """Seeds for the draws of tokens, int64 [T]; the same on every machine.

    From the recipe's seed, a signed 64-bit number, and each token's place: the number of its
    sequence in the corpus, and its column there.
    """
    of_sequence_T = splitmix64(seed + GOLDEN * (sequences_T.long() + 1))
    return splitmix64(of_sequence_T + GOLDEN * (columns_T.long() + 1))


def draw(logits_TV: Tensor, seeds_T: Tensor, *, num_draws: int) -> Tensor:
    """int32 [T, N] ids of softmax(logits), ascending, with repeats.

    An id whose logit is -inf, such as a kept one, is never drawn. Masses are whole numbers, so that
    their sums are exact in any order; less than 2^-40 of the greatest in a row counts as none. A
    row of nothing but -inf gets N times V, which is no id.
    """
    if num_draws == 0:
        return seeds_T.new_empty((len(seeds_T), 0), dtype=torch.int32)
    peak_T1 = logits_TV.amax(dim=1, keepdim=True).clamp(min=torch.finfo(logits_TV.dtype).min)
    up_to_TV = (logits_TV - peak_T1).exp_().mul_(_ONE).long().cumsum_(dim=1)
    places_TN = (_shares(seeds_T, num_draws) * up_to_TV[:, -1:]).long()
    return torch.searchsorted(up_to_TV, places_TN, right=True, out_int32=True)


def draw_rest(
    logits_TV: Tensor, raw: RawTopK, seeds_T: Tensor, *, num_draws: int, temperature: float
) -> Tensor:
    """int32 [T, N] draws from the ids that `raw` does not keep, by the cheaper way.

    Where these have no mass, a draw is the lowest of them.
    """
    vocab_size = logits_TV.shape[1]
    if 2 * num_draws * raw.block_ids <= vocab_size:
        draws_TN = draw_in_blocks(
            logits_TV, raw, seeds_T, num_draws=num_draws, temperature=temperature
        )
        return or_lowest(draws_TN, raw.token_ids_TK, vocab_size=vocab_size)
    at_once = max(1, _LOGITS_AT_ONCE // vocab_size)
    blocks = (tensor.split(at_once) for tensor in (logits_TV, raw.token_ids_TK, seeds_T))
    draws = []
    for rows_TV, ids_TK, rows_T in zip(*blocks, strict=True):
        tail_TV = rows_TV.float().scatter(1, ids_TK.long(), -torch.inf) / temperature
        draws.append(draw(tail_TV, rows_T, num_draws=num_draws))
    return or_lowest(torch.cat(draws), raw.token_ids_TK, vocab_size=vocab_size)


def draw_in_blocks(
    logits_TV: Tensor, raw: RawTopK, seeds_T: Tensor, *, num_draws: int, temperature: float
) -> Tensor:
    """int32 [T, N] draws from the ids that `raw` does not keep, as `draw` makes them; V is at least
    B.

    Where these ids have no mass, draws are V, which is no id.
    """
    # the block of each draw, and the fraction of the block's mass before the draw
    logits_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    vocab_size, width = logits_TV.shape[1], raw.block_ids
    up_to_TM = raw.rest_sums_TM.double().cumsum(dim=1)
    places_TN = _shares(seeds_T, num_draws) * up_to_TM[:, -1:]
    blocks_TN = torch.searchsorted(up_to_TM, places_TN, right=True)
    within_TN = blocks_TN.clamp(max=up_to_TM.shape[1] - 1)
    masses_TN = raw.rest_sums_TM.double().gather(1, within_TN)
    fractions_TN = 1.0 - (up_to_TM.gather(1, within_TN) - places_TN) / masses_TN

    # the block's entries that are not kept; the last block reaches back into the one before
    first_ids_TN = (within_TN * width).clamp(max=vocab_size - width)
    entries_TNB = windows(logits_TV, first_ids_TN, width=width).float()
    ids_TNB = first_ids_TN[:, :, None] + torch.arange(width, device=logits_TV.device)
    excluded_TNB = ids_TNB < within_TN[:, :, None] * width
    if raw.token_ids_TK.shape[1]:
        least_T11, last_T11 = raw.logits_TK[:, -1:, None], raw.token_ids_TK[:, -1:, None]
        excluded_TNB |= (entries_TNB > least_T11) | (
            (entries_TNB == least_T11) & (ids_TNB <= last_T11)
        )

    # the id at the same fraction of their mass, summed anew
    entries_TNB = entries_TNB.masked_fill(excluded_TNB, -torch.inf)
    peaks_TN1 = entries_TNB.amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    within_TNB = ((entries_TNB - peaks_TN1) / temperature).exp().double().cumsum(dim=2)
    places_TN1 = fractions_TN.clamp(0.0, _BELOW_ONE)[:, :, None] * within_TNB[:, :, -1:]
    found_TN = first_ids_TN + torch.searchsorted(within_TNB, places_TN1, right=True)[:, :, 0]
    return torch.where(blocks_TN < up_to_TM.shape[1], found_TN, vocab_size).int()


def or_lowest(draws_TN: Tensor, kept_ids_TK: Tensor, *, vocab_size: int) -> Tensor:
    """The draws; where they are V, which is no id, the lowest id that is not kept."""
    index_K = torch.arange(kept_ids_TK.shape[1], device=kept_ids_TK.device)
    kept_from_0_TK = kept_ids_TK.sort(dim=1).values == index_K
    lowest_T1 = kept_from_0_TK.int().cumprod(dim=1).sum(dim=1, keepdim=True, dtype=torch.int32)
    return torch.where(draws_TN < vocab_size, draws_TN, lowest_T1)


def _shares(seeds_T: Tensor, num_draws: int) -> Tensor:
    """float64 [T, N], ascending: a random point in each of N equal shares of [0, 1).

    A point times a mass is less than the mass, also when rounded.
    """
    index_N = torch.arange(num_draws, device=seeds_T.device)
    shares_TN = (index_N + _uniforms(seeds_T, num_draws)) / num_draws
    return shares_TN.clamp_(max=_BELOW_ONE)


def _uniforms(seeds_T: Tensor, num_draws: int) -> Tensor:
    """float64 [T, N] in [0, 1), of 53 random bits each."""
    index_N = torch.arange(1, num_draws + 1, device=seeds_T.device)
    return shifted(splitmix64(seeds_T[:, None] + GOLDEN * index_N), 11).double() * 2.0**-53
