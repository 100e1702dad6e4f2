"""Logits to targets, exactly: the definition that every faster path is held to.

Shapes: T tokens, V vocabulary, K kept entries.

The kept entries are the K greatest logits, ties to the lowest ids, whatever library found them. Which entries are kept, and in which
order, is decided on the logits as they came (as float32), before temperature and normalisation, which both round: so two correct
implementations agree on every id, however their log-sum-exp differs in its last bit. +0 and -0 are a tie.
"""

import torch
from torch import Tensor

from stillhouse.errors import ConfigError, TeacherError
from stillhouse.logits.compressed import CompressedLogits, concatenate

_BLOCK_LOGITS = 1 << 20  # logits worked on at one time: a few float32 copies of these are the memory beyond the logits themselves


@torch.no_grad()
def compress_reference(logits_TV: Tensor, *, k: int, temperature: float = 1.0, first_token: int = 0) -> CompressedLogits:
    """The target of each row of float16, bfloat16 or float32 logits [T, V], any strides, without tail draws.

    A logit of -inf is a probability of 0. Raises ConfigError for an impossible k or temperature, and TeacherError naming the first token
    (row 0 is `first_token`) whose logits hold NaN or +inf, or nothing above -inf.
    """
    num_tokens, vocab_size = logits_TV.shape
    check_request(k, vocab_size=vocab_size, temperature=temperature)
    step = max(1, _BLOCK_LOGITS // max(1, vocab_size))
    return concatenate(
        [
            _compress_block(logits_TV[start : start + step].float().contiguous(), first_token + start, k=k, temperature=temperature)
            for start in range(0, max(1, num_tokens), step)
        ]
    )


def check_request(k: int, *, vocab_size: int, temperature: float) -> None:
    """Raises ConfigError for a k or a temperature that no target has."""
    if not 0 <= k <= vocab_size:
        raise ConfigError(f"k is {k}, but the vocabulary has {vocab_size} ids; set k between 0 and {vocab_size}")
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"the temperature is {temperature}; set a finite number above 0")


def _compress_block(logits_TV: Tensor, first_token: int, *, k: int, temperature: float) -> CompressedLogits:
    """The reference itself, on float32 logits.

    With m the row's maximum, log p_i = (z_i - m) - log sum exp(z - m): no positive result, and no cancellation of two large numbers. The
    tail's log mass is taken from the smaller side: log1p(-kept mass) where less than half is kept, else a log-sum-exp over the others.
    """
    scaled_TV = logits_TV / temperature
    shifted_TV = scaled_TV - scaled_TV.amax(dim=1, keepdim=True)
    lse_T = shifted_TV.logsumexp(dim=1)
    refuse_what_is_no_distribution(lse_T, logits_TV, first_token, temperature=temperature)
    ids_TK = _exact_topk(logits_TV, k)
    logprobs_TK = shifted_TV.gather(1, ids_TK) - lse_T[:, None]
    kept_mass_T = logprobs_TK.exp().sum(dim=1)
    others_T = shifted_TV.scatter_(1, ids_TK, -torch.inf).logsumexp(dim=1) - lse_T
    return CompressedLogits(
        ids_TK.int(),
        logprobs_TK,
        torch.where(kept_mass_T < 0.5, torch.log1p(-kept_mass_T), others_T),
        torch.empty((logits_TV.shape[0], 0), dtype=torch.int32, device=logits_TV.device),
        vocab_size=logits_TV.shape[1],
        temperature=temperature,
    )


def _exact_topk(logits_TV: Tensor, k: int) -> Tensor:
    """int64 [T, k] ids of the k greatest, by value descending, ties by id ascending.

    torch.topk promises the values, but neither which of several equal entries it takes at the threshold, nor in which order it returns
    equal ones.
    """
    if k == 0:
        return torch.empty((logits_TV.shape[0], 0), dtype=torch.int64, device=logits_TV.device)
    values_TK, ids_TK = logits_TV.topk(k, dim=1)
    threshold_T1 = values_TK[:, -1:]
    tied_T = (logits_TV >= threshold_T1).sum(dim=1) > k
    if tied_T.any():
        ids_TK[tied_T] = _lowest_ids_at_threshold(logits_TV[tied_T], threshold_T1[tied_T], k)
    ids_TK = ids_TK.sort(dim=1).values
    order_TK = logits_TV.gather(1, ids_TK).argsort(dim=1, descending=True, stable=True)
    return ids_TK.gather(1, order_TK)


def _lowest_ids_at_threshold(logits_TV: Tensor, threshold_T1: Tensor, k: int) -> Tensor:
    """int64 [T, k] ids, ascending, of all entries above the threshold and of the first ones that equal it."""
    above_TV, level_TV = logits_TV > threshold_T1, logits_TV == threshold_T1
    room_T1 = k - above_TV.sum(dim=1, keepdim=True)
    taken_TV = above_TV | (level_TV & (level_TV.cumsum(dim=1, dtype=torch.int32) <= room_T1))
    return taken_TV.nonzero()[:, 1].view(-1, k)


def refuse_what_is_no_distribution(lse_T: Tensor, logits_TV: Tensor, first_token: int, *, temperature: float) -> None:
    """Raises TeacherError naming the first row whose log-sum-exp is not finite, and what is wrong with its logits."""
    wrong_T = ~lse_T.isfinite()
    if not wrong_T.any():
        return
    row = int(wrong_T.int().argmax())
    scaled_V = logits_TV[row].float() / temperature
    num_nan, num_infinite = int(scaled_V.isnan().sum()), int((scaled_V == torch.inf).sum())
    found = f"{num_nan} NaN and {num_infinite} +inf" if num_nan + num_infinite else "no logit above -inf"
    raise TeacherError(
        f"the logits of token {first_token + row} are no distribution: {found} among {len(scaled_V)}; wanted finite numbers, or -inf "
        "for ids that are ruled out. Check the teacher's weights, its dtype (float16 overflows where bfloat16 does not) and the temperature"
    )
