"""Draws from the tail of a distribution: stratified, unbiased, and a function of the seed alone.

Shapes: T tokens, N draws, K kept entries, V vocabulary, M blocks of a row, B ids of a block.

1. Lay the proposal's mass out in the order of ids, and cut it into N equal shares (strata).
2. In each share, draw one id in proportion to its mass there.

The proposal of blind draws is the tail. That of weighted draws is half the tail and half the
uniform distribution over the V - K ids that are not kept (`draw_log_weights` has the weights, and
says why).

The expected number of draws of an id is N times its probability in the proposal, as with N
independent draws, and no average over the draws has a larger variance (stratified sampling; Cochran
1977, "Sampling Techniques", chapter 5). Blind draws without kept entries are random-sampled
distillation (RS-KD, arXiv 2503.16870, section 4): an unbiased target.

The random numbers are hashes of one seed for each token, from the recipe and the token's place in
the corpus: a token that is compressed again has the same draws.

`draw` looks at every id. `draw_in_blocks` finds the block in which a draw falls, from the block-max
filter's sums, and looks at that block alone: less work where draws are few. The two agree except
for draws within float32 rounding of the border between two ids.
"""

import torch
from torch import Tensor

from stillhouse.logits.topk.blockmax_torch import windows
from stillhouse.logits.topk.found import RawTopK, peaks
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


def draw(
    logits_TV: Tensor, seeds_T: Tensor, *, num_draws: int, others_TV: Tensor | None = None
) -> Tensor:
    """int32 [T, N] ids of softmax(logits), ascending, with repeats.

    With `others_TV`, a mask of the ids that are not kept, draws are weighted ones: half of
    softmax(logits), half spread evenly over these ids. Else an id whose logit is -inf, such as a
    kept one, is never drawn. A row of nothing but -inf gets N times V, which is no id.
    """
    if num_draws == 0:
        return seeds_T.new_empty((len(seeds_T), 0), dtype=torch.int32)
    masses_TV = whole_masses(logits_TV, peaks(logits_TV))
    if others_TV is not None:
        sums_T1, counts_T1 = (tensor.sum(dim=1, keepdim=True) for tensor in (masses_TV, others_TV))
        masses_TV = half_uniform(masses_TV, others_TV, sums_T1=sums_T1, counts_T1=counts_T1)
    up_to_TV = masses_TV.cumsum_(dim=1)
    places_TN = whole_places(seeds_T, up_to_TV[:, -1:], num_draws=num_draws)
    return torch.searchsorted(up_to_TV, places_TN, right=True, out_int32=True)


def whole_masses(logits_TV: Tensor, peaks_T1: Tensor) -> Tensor:
    """int64 [T, V]: exp(logit - peak) as whole numbers, whose sums are exact in any order.

    Less than 2^-40 of the greatest in a row counts as none.
    """
    return (logits_TV - peaks_T1).exp_().mul_(_ONE).long()


def half_uniform(
    masses_TV: Tensor, others_TV: Tensor, *, sums_T1: Tensor, counts_T1: Tensor
) -> Tensor:
    """Half of these whole masses, and as much spread evenly over the ids of a mask; in place.

    The sums of the masses and the counts of the mask's ids may be of more ids than are here.
    """
    shares_T1 = sums_T1 // (2 * counts_T1.clamp(min=1))
    return masses_TV.bitwise_right_shift_(1).add_(others_TV * shares_T1)


def whole_places(seeds_T: Tensor, sums_T1: Tensor, *, num_draws: int) -> Tensor:
    """int64 [T, N]: where the draws fall in a row of whole masses, which has this sum."""
    return (_shares(seeds_T, num_draws) * sums_T1).long()


def draw_rest(
    logits_TV: Tensor,
    raw: RawTopK,
    seeds_T: Tensor,
    *,
    num_draws: int,
    temperature: float,
    weighted: bool = False,
) -> Tensor:
    """int32 [T, N] draws from the ids that `raw` does not keep, by the cheaper way.

    Where these have no mass, a draw is the lowest of them.
    """
    vocab_size = logits_TV.shape[1]
    if 2 * num_draws * raw.block_ids <= vocab_size:
        draws_TN = draw_in_blocks(
            logits_TV,
            raw,
            seeds_T,
            num_draws=num_draws,
            temperature=temperature,
            weighted=weighted,
        )
        return or_lowest(draws_TN, raw.token_ids_TK, vocab_size=vocab_size)
    at_once = max(1, _LOGITS_AT_ONCE // vocab_size)
    blocks = (tensor.split(at_once) for tensor in (logits_TV, raw.token_ids_TK, seeds_T))
    draws = []
    for rows_TV, ids_TK, rows_T in zip(*blocks, strict=True):
        tail_TV = rows_TV.float().scatter(1, ids_TK.long(), -torch.inf) / temperature
        others_TV = others(tail_TV, ids_TK) if weighted else None
        draws.append(draw(tail_TV, rows_T, num_draws=num_draws, others_TV=others_TV))
    return or_lowest(torch.cat(draws), raw.token_ids_TK, vocab_size=vocab_size)


def others(logits_TV: Tensor, kept_ids_TK: Tensor) -> Tensor:
    """bool [T, V]: the ids that are not kept."""
    return torch.ones_like(logits_TV, dtype=torch.bool).scatter_(1, kept_ids_TK.long(), False)


def draw_in_blocks(
    logits_TV: Tensor,
    raw: RawTopK,
    seeds_T: Tensor,
    *,
    num_draws: int,
    temperature: float,
    weighted: bool = False,
) -> Tensor:
    """int32 [T, N] draws from the ids that `raw` does not keep, as `draw` makes them; V is at least
    B.

    Where these ids have no mass, draws are V, which is no id.
    """
    # the block of each draw, and the fraction of the block's mass before the draw
    logits_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    vocab_size, width = logits_TV.shape[1], raw.block_ids
    sums_TM = raw.rest_sums_TM.double()
    masses_TM = _half_uniform_blocks(raw, vocab_size=vocab_size) if weighted else sums_TM
    up_to_TM = masses_TM.cumsum(dim=1)
    places_TN = _shares(seeds_T, num_draws) * up_to_TM[:, -1:]
    blocks_TN = torch.searchsorted(up_to_TM, places_TN, right=True)
    within_TN = blocks_TN.clamp(max=up_to_TM.shape[1] - 1)
    fractions_TN = 1.0 - (up_to_TM.gather(1, within_TN) - places_TN) / masses_TM.gather(
        1, within_TN
    )

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
    masses_TNB = ((entries_TNB - peaks_TN1) / temperature).exp().double()
    if weighted:
        shares_TN = sums_TM.gather(1, within_TN) / sums_TM.sum(dim=1, keepdim=True)
        masses_TNB *= (shares_TN / masses_TNB.sum(dim=2).clamp(min=1.0))[:, :, None]
        masses_TNB += ~excluded_TNB / (vocab_size - raw.token_ids_TK.shape[1])
    up_to_TNB = masses_TNB.cumsum(dim=2)
    places_TN1 = fractions_TN.clamp(0.0, _BELOW_ONE)[:, :, None] * up_to_TNB[:, :, -1:]
    found_TN = first_ids_TN + torch.searchsorted(up_to_TNB, places_TN1, right=True)[:, :, 0]
    return torch.where(blocks_TN < up_to_TM.shape[1], found_TN, vocab_size).int()


def _half_uniform_blocks(raw: RawTopK, *, vocab_size: int) -> Tensor:
    """float64 [T, M]: each block's share of the rest's mass, and of the ids that are not kept.

    0 in a row whose rest has no mass.
    """
    sums_TM, kept_TK = raw.rest_sums_TM.double(), raw.token_ids_TK.long()
    num_blocks, width = sums_TM.shape[1], raw.block_ids
    first_ids_M = width * torch.arange(num_blocks, device=sums_TM.device)
    counts_TM = (vocab_size - first_ids_M).clamp(max=width).double().repeat(len(sums_TM), 1)
    counts_TM.scatter_add_(1, kept_TK // width, counts_TM.new_full(kept_TK.shape, -1.0))
    total_T1 = sums_TM.sum(dim=1, keepdim=True)
    masses_TM = sums_TM / total_T1 + counts_TM / max(1, vocab_size - kept_TK.shape[1])
    return masses_TM.where(total_T1 != 0.0, 0.0)


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
