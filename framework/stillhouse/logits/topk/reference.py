"""Reference of target compression: the exact definition that every faster backend is held to.

Shapes: T tokens, V vocabulary, K kept entries, N draws from the tail.

For each row z of logits, with p = softmax(z / temperature) over all V ids:

1. The kept entries are the K greatest logits, ties to the lowest ids.
2. Their log-probabilities are log p, never renormalised.
3. The tail's log mass is log(1 - sum of the kept p).
4. The draws are N ids from the rest of p (`draws`); weighted ones have their log p.
5. The tail's entropy is that of the rest of p, normalised, in nats.
6. The label's log-probability is log p of the token that really follows.

Step 1 compares the logits as they came, widened to float32, before temperature and normalisation,
which both round. So two correct implementations agree on every id and on the order of ids, however
their log-sum-exp differs in its last bit. +0 and -0 are a tie.
"""

import torch
from torch import Tensor

from stillhouse.errors import ConfigError, TeacherError
from stillhouse.logits.compressed import CompressedLogits, concatenate
from stillhouse.logits.spec import TargetSpec
from stillhouse.logits.topk.draws import draw, or_lowest, others
from stillhouse.logits.topk.found import entropy_sums, peaks, tail_entropy

# Logits of one block of rows. A block needs a few float32 copies of them beside the logits, and
# costs tens of launches and some waits on a GPU, however few its rows.
_CPU_LOGITS = 1 << 20
_GPU_LOGITS = 1 << 24


@torch.no_grad()
def compress_reference(
    logits_TV: Tensor,
    spec: TargetSpec,
    *,
    seeds_T: Tensor | None = None,
    labels_T: Tensor | None = None,
    tokens_T: Tensor | None = None,
) -> CompressedLogits:
    """`compress` by its definition: slow, and exact for every row.

    Arguments, result and errors are those of `compress`. An error names token tokens_T[t] for row
    t, or t itself.
    """
    num_tokens, vocab_size = logits_TV.shape
    seeds_T = checked_seeds(seeds_T, logits_TV, spec=spec, vocab_size=vocab_size)
    labels_T = checked_labels(labels_T, logits_TV, spec=spec)
    tokens_T = torch.arange(num_tokens) if tokens_T is None else tokens_T
    step = rows_at_once(logits_TV.device, vocab_size)
    blocks = [slice(start, start + step) for start in range(0, max(1, num_tokens), step)]
    parts = [
        _compress_block(
            logits_TV[at].float().contiguous(),
            spec,
            tokens_T=tokens_T[at],
            seeds_T=seeds_T[at],
            labels_T=labels_T[at],
        )
        for at in blocks
    ]
    return concatenate(parts)


def rows_at_once(device: torch.device, vocab_size: int) -> int:
    return max(1, (_CPU_LOGITS if device.type == "cpu" else _GPU_LOGITS) // max(1, vocab_size))


def checked_seeds(
    seeds_T: Tensor | None, rows_TX: Tensor, *, spec: TargetSpec, vocab_size: int
) -> Tensor:
    """One seed for each row, on the rows' device: `seeds_T`, or zeros where `spec` has no draws.

    Raises ConfigError where rows of `vocab_size` logits are not of `spec`, or seeds are missing.
    """
    if vocab_size != spec.vocab_size:
        raise ConfigError(
            f"rows of {vocab_size} logits meet a spec of {spec.vocab_size} ids; make the spec of "
            "the tokenizer's vocabulary, and slice a padded head to it"
        )
    if spec.num_draws == 0:
        return torch.zeros(rows_TX.shape[0], dtype=torch.int64, device=rows_TX.device)
    if seeds_T is None or seeds_T.shape != rows_TX.shape[:1]:
        found = "no seeds" if seeds_T is None else f"seeds of shape {list(seeds_T.shape)}"
        raise ConfigError(
            f"{spec.num_draws} draws are asked for with {found} for {rows_TX.shape[0]} tokens; "
            "pass one for each, from token_seeds"
        )
    return seeds_T.to(rows_TX.device)


def checked_labels(labels_T: Tensor | None, rows_TX: Tensor, *, spec: TargetSpec) -> Tensor:
    """One label for each row, int64 on the rows' device: `labels_T`, or zeros where `spec` has no
    label.

    Raises ConfigError where labels are missing, too many, or not of the vocabulary. Labels on the
    CPU are checked without waiting for another device.
    """
    num_tokens, vocab_size = rows_TX.shape[0], spec.vocab_size
    if not spec.label_logprob:
        if labels_T is not None:
            raise ConfigError(
                "labels are given for a spec without label_logprob, which keeps nothing of them; "
                "set label_logprob, or give none"
            )
        return torch.zeros(num_tokens, dtype=torch.int64, device=rows_TX.device)
    if labels_T is None or labels_T.shape != rows_TX.shape[:1]:
        found = "no labels" if labels_T is None else f"labels of shape {list(labels_T.shape)}"
        raise ConfigError(
            f"label_logprob is asked for with {found} for {num_tokens} tokens; pass one for each, "
            "the id of the token that follows"
        )
    if num_tokens and not 0 <= int(labels_T.min()) <= int(labels_T.max()) < vocab_size:
        wrong = next(label for label in labels_T.tolist() if not 0 <= label < vocab_size)
        raise ConfigError(
            f"a label is {wrong}, wanted ids from 0 to {vocab_size - 1}; make the spec of the "
            "vocabulary of the tokens"
        )
    return labels_T.long().to(rows_TX.device)


def _compress_block(
    logits_TV: Tensor, spec: TargetSpec, *, tokens_T: Tensor, seeds_T: Tensor, labels_T: Tensor
) -> CompressedLogits:
    """The definition, on contiguous float32 logits.

    With m the row's maximum, log p_i = (z_i - m) - log sum exp(z - m): no positive result, and no
    cancellation of two large numbers. The tail's log mass is taken from the smaller side:
    log1p(-kept mass) where less than half is kept, else a log-sum-exp over the other ids.
    """
    # 1. softmax, refused where it is no distribution
    scaled_TV = logits_TV / spec.temperature
    shifted_TV = scaled_TV - scaled_TV.amax(dim=1, keepdim=True)
    lse_T = shifted_TV.logsumexp(dim=1)
    _require_distributions(lse_T, scaled_TV, tokens_T)

    # 2. the kept entries, and the label before it is overwritten
    ids_TK = _exact_topk(logits_TV, spec.k)
    logprobs_TK = shifted_TV.gather(1, ids_TK) - lse_T[:, None]
    label_logprob_T = (shifted_TV.gather(1, labels_T[:, None]) - lse_T[:, None])[:, 0]

    # 3. the tail's mass
    kept_mass_T = logprobs_TK.exp().sum(dim=1)
    others_T = shifted_TV.scatter_(1, ids_TK, -torch.inf).logsumexp(dim=1) - lse_T
    tail_logmass_T = torch.where(kept_mass_T < 0.5, torch.log1p(-kept_mass_T), others_T)

    # 4. draws from the tail, of which none is kept
    tail_TV = scaled_TV.scatter_(1, ids_TK, -torch.inf)
    others_TV = others(tail_TV, ids_TK) if spec.weighted else None
    draws_TN = draw(tail_TV, seeds_T, num_draws=spec.num_draws, others_TV=others_TV)
    draws_TN = or_lowest(draws_TN, ids_TK, vocab_size=spec.vocab_size)
    draw_logprobs_TN = shifted_TV.gather(1, draws_TN.long()) - lse_T[:, None]

    # 5. the tail's entropy, in float64
    entropy_T = None
    if spec.tail_entropy:
        exact_TV = tail_TV.double()
        entropy_T = tail_entropy(*entropy_sums(exact_TV, peaks(exact_TV)))
    return CompressedLogits(
        ids_TK.int(),
        logprobs_TK,
        tail_logmass_T,
        draws_TN,
        vocab_size=spec.vocab_size,
        temperature=spec.temperature,
        draw_logprobs_TN=draw_logprobs_TN if spec.weighted else None,
        label_logprob_T=label_logprob_T if spec.label_logprob else None,
        tail_entropy_T=entropy_T,
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
    """int64 [T, k] ids, ascending: all entries above the threshold, then the first that equal
    it."""
    above_TV, level_TV = logits_TV > threshold_T1, logits_TV == threshold_T1
    room_T1 = k - above_TV.sum(dim=1, keepdim=True)
    taken_TV = above_TV | (level_TV & (level_TV.cumsum(dim=1, dtype=torch.int32) <= room_T1))
    return taken_TV.nonzero()[:, 1].view(-1, k)


def _require_distributions(lse_T: Tensor, scaled_TV: Tensor, tokens_T: Tensor) -> None:
    """Raise TeacherError naming the first token whose log-sum-exp is not finite."""
    wrong_T = ~lse_T.isfinite()
    if not wrong_T.any():
        return
    row = int(wrong_T.int().argmax())
    num_nan = int(scaled_TV[row].isnan().sum())
    num_infinite = int((scaled_TV[row] == torch.inf).sum())
    found = f"{num_nan} NaN and {num_infinite} +inf"
    if num_nan + num_infinite == 0:
        found = "no logit above -inf"
    raise TeacherError(
        f"the logits of token {int(tokens_T[row])} are no distribution: {found} among "
        f"{scaled_TV.shape[1]}; wanted finite numbers, or -inf for ids that are ruled out. Check "
        "the teacher's weights, its dtype (float16 overflows where bfloat16 does not) and the "
        "temperature"
    )
