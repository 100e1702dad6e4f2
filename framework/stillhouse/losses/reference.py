"""The distillation loss by its definition, with logits of T x V in memory and gradients by
autograd: the plain reference of the fused head.

Shapes: T tokens, K kept entries, K1 = K + 1 buckets with the tail last, N draws, V vocabulary, H
hidden.
"""

import torch
from torch import Tensor

from stillhouse.logits import CompressedLogits, Head
from stillhouse.losses.divergences import LOG_FLOOR
from stillhouse.losses.sparse_gradient import Objective
from stillhouse.losses.weighted_draws import tail_rest


def reference_loss(
    hidden_TH: Tensor,
    head: Head,
    *,
    target: CompressedLogits | None,
    labels_T: Tensor | None,
    objective: Objective,
) -> Tensor:
    """The objective's total, as `head_loss` sums it."""
    logits_TV, total = head.logits(hidden_TH), hidden_TH.new_zeros(())
    if target is not None:
        divergence, draws_TN = objective.divergence, target.tail_ids_TN.long()
        # the student's buckets at the target's temperature
        logq_TV = (logits_TV / target.temperature).log_softmax(dim=1)
        ids_TK = target.token_ids_TK.long()
        tail_T1 = logq_TV.scatter(1, ids_TK, -torch.inf).logsumexp(dim=1, keepdim=True)
        logq_TK1 = torch.cat([logq_TV.gather(1, ids_TK), tail_T1.clamp(min=LOG_FLOOR)], dim=1)
        logp_TK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], dim=1)
        logp_TK1 = logp_TK1.to(logq_TK1.dtype)
        loss_T = divergence.of(logp_TK1.clamp(min=LOG_FLOOR), logq_TK1)
        # the draws: the rest of the divergence, or the cross-entropy within the tail
        within_TN = logq_TV.gather(1, draws_TN) - tail_T1
        generator, share_T = divergence.tail_generator, logp_TK1[:, -1].exp()
        if target.draw_logprobs_TN is not None and generator is not None:
            loss_T = loss_T + tail_rest(target, within_TN, tail_T1, generator=generator)
        elif target.num_draws:
            share_T = divergence.forward_kl_share * share_T
            loss_T = loss_T - share_T * within_TN.mean(dim=1)
            if target.tail_entropy_T is not None:
                loss_T = loss_T - share_T * target.tail_entropy_T
        total = objective.divergence_weight * target.temperature**2 * loss_T.sum()
    # the label loss, at temperature 1
    if labels_T is not None:
        cross_entropy = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
        total = total + objective.ce_weight * cross_entropy
    return total + objective.z_loss_weight * logits_TV.logsumexp(dim=1).square().sum()
