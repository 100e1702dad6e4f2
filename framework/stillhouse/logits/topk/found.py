"""`RawTopK`: what every fast backend finds, and functions that make it a target.

Shapes: T tokens, V vocabulary, K kept entries, M blocks of a row, X ids of each token.

All backends share these functions, or repeat their arithmetic (`targets.c`), so that they round
alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.logits.compressed import CompressedLogits

# Logits that are read together: two float32 copies of them stay in a CPU core's cache, or 64 MB.
_CACHED_LOGITS, _GPU_LOGITS = 1 << 17, 1 << 24
_NO_MASS = -1000.0  # a log mass whose exponential is 0, in float32 and in float64


@dataclass(frozen=True, slots=True)
class RawTopK:
    """The K greatest logits of each row, and the sums of exponentials of the other ids by block.

    A row of logits with NaN has NaN among its numbers here.
    """

    token_ids_TK: Tensor  # int32, by logit descending, ties by id ascending
    logits_TK: Tensor  # float32, before temperature
    # float32: a logit that keeps the sums in range, the greatest of the others or of all
    rest_base_T: Tensor
    # float32: for each block, the sum of exp((logit - rest_base) / temperature) over its other ids
    rest_sums_TM: Tensor
    block_ids: int  # ids in each block; the last one may have fewer


def normalise(
    raw: RawTopK, *, vocab_size: int, temperature: float
) -> tuple[CompressedLogits, Tensor]:
    """The target without draws, and the log-sum-exp of logits / temperature, float64 [T].

    The log-sum-exp is NaN where a row is no distribution in float32. The arithmetic is in float64
    and relative to the greatest logit, so neither a tail of e^-90 nor a kept mass of 1e-6 loses
    digits.
    """
    kept_TK, rest_base_T1 = raw.logits_TK.double(), raw.rest_base_T.double()[:, None]
    top_T1 = torch.cat([kept_TK, rest_base_T1], dim=1).amax(dim=1, keepdim=True)
    kept_TK = (kept_TK - top_T1) / temperature
    rest_sum_T1 = raw.rest_sums_TM.sum(dim=1, keepdim=True, dtype=torch.float64)
    rest_T1 = (rest_base_T1 - top_T1) / temperature + rest_sum_T1.log()
    log_sum_T1 = torch.cat([kept_TK, rest_T1], dim=1).logsumexp(dim=1, keepdim=True)
    target = CompressedLogits(
        raw.token_ids_TK,
        (kept_TK - log_sum_T1).float(),
        (rest_T1 - log_sum_T1)[:, 0].float(),
        raw.token_ids_TK.new_empty((raw.token_ids_TK.shape[0], 0)),
        vocab_size=vocab_size,
        temperature=temperature,
    )
    lse_T = (top_T1 / temperature + log_sum_T1)[:, 0]
    return target, lse_T.where(lse_T.float().isfinite(), torch.nan)


def logprobs_at(logits_TV: Tensor, ids_TX: Tensor, *, lse_T: Tensor, temperature: float) -> Tensor:
    """float32 [T, X]: log p of some ids, from the float64 log-sum-exp of `normalise`."""
    scaled_TX = logits_TV.gather(1, ids_TX.long()).double() / temperature
    return (scaled_TX - lse_T[:, None]).float()


def peaks(logits_TV: Tensor) -> Tensor:
    """[T, 1]: the greatest logit of each row, or the least number where all are -inf."""
    return logits_TV.amax(dim=1, keepdim=True).clamp(min=torch.finfo(logits_TV.dtype).min)


def entropy_sums(tail_TV: Tensor, peaks_T1: Tensor) -> tuple[Tensor, Tensor]:
    """[T] and [T]: the sums of e^x and of x e^x, with x the logits less a row's peak.

    The logits are divided by the temperature, and -inf for ids outside the tail. In place.
    """
    shifted_TV = tail_TV.sub_(peaks_T1).clamp_(min=_NO_MASS)  # 0 times -inf would be NaN
    masses_TV = shifted_TV.exp()
    return masses_TV.sum(dim=1), torch.linalg.vecdot(masses_TV, shifted_TV)


def tail_entropy(sums_T: Tensor, weighted_sums_T: Tensor) -> Tensor:
    """float32 [T]: the entropy in nats from `entropy_sums` of a whole tail; 0 without mass."""
    sums_T, weighted_sums_T = sums_T.double(), weighted_sums_T.double()
    entropy_T = (sums_T.log() - weighted_sums_T / sums_T).clamp(min=0.0)
    return entropy_T.where(sums_T >= 1.0, 0.0).float()


def entropy_of_rest(logits_TV: Tensor, kept_ids_TK: Tensor, *, temperature: float) -> Tensor:
    """float32 [T]: the entropy in nats of the distribution over the ids that are not kept.

    One more read of the logits, a few rows at a time, which stay in a CPU core's cache.
    """
    at_once = _CACHED_LOGITS if logits_TV.device.type == "cpu" else _GPU_LOGITS
    num_rows = max(1, at_once // logits_TV.shape[1])
    parts = []
    for rows_TV, ids_TK in zip(logits_TV.split(num_rows), kept_ids_TK.split(num_rows), strict=True):
        tail_TV = rows_TV.float().scatter(1, ids_TK.long(), -torch.inf)
        tail_TV = tail_TV.div_(temperature) if temperature != 1.0 else tail_TV
        parts.append(tail_entropy(*entropy_sums(tail_TV, peaks(tail_TV))))
    return torch.cat(parts)
