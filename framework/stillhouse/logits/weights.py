"""What the draws of a target stand for: their weights, and the distribution that they spell out.

Shapes: T tokens, K kept entries, N draws, V vocabulary.
"""

import math

import torch
from torch import Tensor

from stillhouse.logits.compressed import CompressedLogits

_LEAST = torch.finfo(torch.float32).min  # a log-weight whose exponential is 0


def draw_log_weights(target: CompressedLogits) -> Tensor:
    """log w of each draw, float32 [T, N], finite.

    The sum over a token's draws of w f(id) estimates, without bias and for any f, the sum over the
    tail of p f(id). The expected number of draws of an id is N r, so w = p / (N r).

    Blind draws have r = p / P, with P the tail's mass: each weight is P / N. Weighted draws have
    r = (p / P + 1 / (V - K)) / 2, a defensive mixture (Hesterberg 1995, "Weighted average
    importance sampling and defensive mixture distributions"): no weight is above 2 P / N or
    2 p (V - K) / N, so w f has a bound where f is large on ids that are rare in p, as it is for a
    model far from the teacher. Both are functions of what a record holds, decoded or exact. A draw
    without mass has the least float32, so that its weight is exactly 0.
    """
    log_tail_T1, log_num_draws = target.tail_logmass_T[:, None], math.log(max(1, target.num_draws))
    if target.draw_logprobs_TN is None:
        log_weights_TN = (log_tail_T1 - log_num_draws).expand(target.tail_ids_TN.shape)
    else:
        log_num_tail = math.log(max(1, target.vocab_size - target.k))
        relative_TN = target.draw_logprobs_TN - log_tail_T1.clamp(min=_LEAST)
        mixed_TN = relative_TN.logaddexp(relative_TN.new_tensor(-log_num_tail)) - math.log(2)
        log_weights_TN = target.draw_logprobs_TN - mixed_TN - log_num_draws
    return log_weights_TN.clamp(min=_LEAST)


def densify(compressed: CompressedLogits) -> Tensor:
    """Dense log-probabilities, float32 [T, V]: kept entries as they are, the tail spread out.

    The tail's mass is shared by the draws, in proportion to their weights, or, without draws,
    evenly by all other ids. The result is as large as the logits: use it for tests and small
    vocabularies.

        log_probs_TV = densify(compress(logits_TV, TargetSpec(vocab_size=1000, k=64)))
        log_probs_TV.exp().sum(dim=1)  # 1 for each token
    """
    kept_TK, logprobs_TK = compressed.token_ids_TK.long(), compressed.logprobs_TK
    shape = (compressed.num_tokens, compressed.vocab_size)
    if compressed.num_draws:
        log_weights_TN = draw_log_weights(compressed)
        weights_TN = (log_weights_TN - log_weights_TN.amax(dim=1, keepdim=True)).exp()
        shares_TV = logprobs_TK.new_zeros(shape)
        shares_TV.scatter_add_(1, compressed.tail_ids_TN.long(), weights_TN)
    else:
        shares_TV = logprobs_TK.new_ones(shape).scatter_(1, kept_TK, 0.0)
    spread_TV = shares_TV.log() - shares_TV.sum(dim=1, keepdim=True).log()
    return (compressed.tail_logmass_T[:, None] + spread_TV).scatter(1, kept_TK, logprobs_TK)
