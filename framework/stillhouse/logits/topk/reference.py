"""Logits to targets, exactly: the definition that every faster path is held to.

Shapes: T tokens, V vocabulary, K kept entries, N draws from the tail.

The kept entries are the K greatest logits, ties to the lowest ids, whatever library found them.
Which entries are kept, and in which order, is decided on the logits as they came (as float32),
before temperature and normalisation, which both round: so two correct implementations agree on
every id, however their log-sum-exp differs in its last bit. +0 and -0 are a tie.
"""

import torch
from torch import Tensor

from stillhouse.errors import ConfigError, TeacherError
from stillhouse.logits.compressed import CompressedLogits, concatenate
from stillhouse.logits.topk.draws import draw, or_lowest

_CPU_LOGITS = (
    1 << 20
    # worked on at one time: a few float32 copies of these are the memory beyond the logits
    # themselves
)
# the same; each block of rows costs tens of launches and some waits, however few the rows
_GPU_LOGITS = 1 << 24


@torch.no_grad()
def compress_reference(
    logits_TV: Tensor,
    *,
    k: int,
    tail_draws: int = 0,
    temperature: float = 1.0,
    seeds_T: Tensor | None = None,
    tokens_T: Tensor | None = None,
) -> CompressedLogits:
    """The target of each row of float16, bfloat16 or float32 logits [T, V], any strides: k exact
    entries and `tail_draws` draws.

    A logit of -inf is a probability of 0. Draws need `seeds_T` (int64, see `token_seeds`), which
    with the logits decide them; where the tail has no mass, and so its draws no weight, they are
    the lowest id that is not kept. Raises ConfigError for an impossible k, number of draws or
    temperature, and TeacherError naming the first token whose logits hold NaN or +inf, or nothing
    above -inf. Row t is token t for people, or tokens_T[t].
    """
    num_tokens, vocab_size = logits_TV.shape
    seeds_T = checked_seeds(
        seeds_T,
        logits_TV,
        k=k,
        tail_draws=tail_draws,
        vocab_size=vocab_size,
        temperature=temperature,
    )
    tokens_T = torch.arange(num_tokens) if tokens_T is None else tokens_T
    step = rows_at_once(logits_TV.device, vocab_size)
    blocks = [slice(start, start + step) for start in range(0, max(1, num_tokens), step)]
    return concatenate(
        [
            _compress_block(
                logits_TV[at].float().contiguous(),
                tokens_T[at],
                seeds_T[at],
                k=k,
                tail_draws=tail_draws,
                temperature=temperature,
            )
            for at in blocks
        ]
    )


def rows_at_once(device: torch.device, vocab_size: int) -> int:
    return max(1, (_CPU_LOGITS if device.type == "cpu" else _GPU_LOGITS) // max(1, vocab_size))


def checked_seeds(
    seeds_T: Tensor | None,
    rows_TX: Tensor,
    *,
    k: int,
    tail_draws: int,
    vocab_size: int,
    temperature: float,
) -> Tensor:
    """The seeds, one for each row, on its device; any where nothing is drawn. Raises ConfigError
    for what no target has."""
    if not 0 <= k <= vocab_size:
        raise ConfigError(
            f"k is {k}, but the vocabulary has {vocab_size} ids; set k between 0 and {vocab_size}"
        )
    if tail_draws < 0 or (tail_draws > 0 and k == vocab_size):
        raise ConfigError(
            f"{tail_draws} draws are asked for from a tail of {vocab_size - k} ids (k is {k} of "
            f"{vocab_size}); draw none, or keep fewer"
        )
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"the temperature is {temperature}; set a finite number above 0")
    if tail_draws == 0:
        return torch.zeros(rows_TX.shape[0], dtype=torch.int64, device=rows_TX.device)
    if seeds_T is None or seeds_T.shape != rows_TX.shape[:1]:
        found = "no seeds" if seeds_T is None else f"seeds of shape {list(seeds_T.shape)}"
        raise ConfigError(
            f"{tail_draws} draws are asked for with {found} for {rows_TX.shape[0]} tokens; pass "
            "one for each, from token_seeds"
        )
    return seeds_T.to(rows_TX.device)


def _compress_block(
    logits_TV: Tensor,
    tokens_T: Tensor,
    seeds_T: Tensor,
    *,
    k: int,
    tail_draws: int,
    temperature: float,
) -> CompressedLogits:
    """The reference itself, on float32 logits.

    With m the row's maximum, log p_i = (z_i - m) - log sum exp(z - m): no positive result, and no
    cancellation of two large numbers. The tail's log mass is taken from the smaller side:
    log1p(-kept mass) where less than half is kept, else a log-sum-exp over the others.
    """
    scaled_TV = logits_TV / temperature
    shifted_TV = scaled_TV - scaled_TV.amax(dim=1, keepdim=True)
    lse_T = shifted_TV.logsumexp(dim=1)
    _refuse_what_is_no_distribution(lse_T, scaled_TV, tokens_T)
    ids_TK = _exact_topk(logits_TV, k)
    logprobs_TK = shifted_TV.gather(1, ids_TK) - lse_T[:, None]
    kept_mass_T = logprobs_TK.exp().sum(dim=1)
    others_T = shifted_TV.scatter_(1, ids_TK, -torch.inf).logsumexp(dim=1) - lse_T
    return CompressedLogits(
        ids_TK.int(),
        logprobs_TK,
        torch.where(kept_mass_T < 0.5, torch.log1p(-kept_mass_T), others_T),
        or_lowest(
            draw(scaled_TV.scatter_(1, ids_TK, -torch.inf), seeds_T, num_draws=tail_draws),
            ids_TK,
            vocab_size=logits_TV.shape[1],
        ),
        vocab_size=logits_TV.shape[1],
        temperature=temperature,
    )


def _exact_topk(logits_TV: Tensor, k: int) -> Tensor:
    """int64 [T, k] ids of the k greatest, by value descending, ties by id ascending.

    torch.topk promises the values, but neither which of several equal entries it takes at the
    threshold, nor in which order it returns equal ones.
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
    """int64 [T, k] ids, ascending, of all entries above the threshold and of the first ones that
    equal it."""
    above_TV, level_TV = logits_TV > threshold_T1, logits_TV == threshold_T1
    room_T1 = k - above_TV.sum(dim=1, keepdim=True)
    taken_TV = above_TV | (level_TV & (level_TV.cumsum(dim=1, dtype=torch.int32) <= room_T1))
    return taken_TV.nonzero()[:, 1].view(-1, k)


def _refuse_what_is_no_distribution(lse_T: Tensor, scaled_TV: Tensor, tokens_T: Tensor) -> None:
    wrong_T = ~lse_T.isfinite()
    if not wrong_T.any():
        return
    row = int(wrong_T.int().argmax())
    num_nan, num_infinite = (
        int(scaled_TV[row].isnan().sum()),
        int((scaled_TV[row] == torch.inf).sum()),
    )
    found = (
        f"{num_nan} NaN and {num_infinite} +inf"
        if num_nan + num_infinite
        else "no logit above -inf"
    )
    raise TeacherError(
        f"the logits of token {int(tokens_T[row])} are no distribution: {found} among "
        f"{scaled_TV.shape[1]}; wanted finite numbers, or -inf "
        "for ids that are ruled out. Check the teacher's weights, its dtype (float16 overflows "
        "where bfloat16 does not) and the temperature"
    )
