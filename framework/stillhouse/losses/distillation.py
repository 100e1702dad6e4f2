"""The distillation loss of a student: a divergence to the teacher's targets, cross-entropy to the
labels and the z-loss, weighted and summed over tokens.

Shapes: T tokens, H hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.errors import ConfigError, ModelError
from stillhouse.logits import CompressedLogits, Head
from stillhouse.losses.divergences import Divergence, forward_kl, is_unbiased_with_draws
from stillhouse.losses.fused_head import head_loss
from stillhouse.losses.sparse_gradient import Objective


class LossTerms(NamedTuple):
    """Sums over tokens, and extremes of their draws, 0-dimensional tensors. Only `total` has a
    gradient. A term whose weight is 0 is not computed, and is 0."""

    total: Tensor  # weighted, with temperature^2 on the divergence
    divergence: Tensor  # nats at the target's temperature, unweighted
    cross_entropy: Tensor  # nats at temperature 1, unweighted
    z_loss: Tensor  # squared log-sum-exp of the logits at temperature 1, unweighted
    max_logratio: Tensor  # the largest log(student / teacher) of a weighted draw, at least 0; nats
    max_draw_mass: Tensor  # the largest mass of the student that one weighted draw stands for
    num_tokens: Tensor  # int64


def distillation_loss(
    hidden_TH: Tensor,
    head: Head,
    target: CompressedLogits | None = None,
    *,
    divergence: Divergence = forward_kl,
    labels_T: Tensor | None = None,
    divergence_weight: float = 1.0,
    ce_weight: float = 0.0,
    z_loss_weight: float = 0.0,
    block_tokens: int | None = None,
) -> LossTerms:
    """The distillation loss, SUMMED over T tokens, without logits of T x V in memory:

    divergence_weight * temperature^2 * D + ce_weight * CE + z_loss_weight * lse^2

        terms = distillation_loss(hidden_TH, head, target, divergence=divergence_named("jsd", 0.1))
        (terms.total / terms.num_tokens).backward()

    `hidden_TH`: the student's final hidden states at the T positions that have a target.
    `head`: the student's LM head; its weight and bias get gradients where they require them.
    `target`: T targets on the same device; not needed where `divergence_weight` is 0.
    `labels_T`: the ids that really come next, integers; not needed where `ce_weight` is 0.
    `block_tokens`: tokens whose logits exist at one time; None: by the device (see `head_loss`).

    D, from teacher to student, is at the target's temperature; temperature^2 keeps the size of its
    gradients (Hinton et al. 2015, arXiv 1503.02531, section 2). Cross-entropy (CE) and the z-loss
    are at temperature 1. The z-loss keeps lse, the log-sum-exp of the logits, near 0 (PaLM, arXiv
    2204.02311, section 5: weight 1e-4). Weighted draws serve every divergence that has a
    `generator`, blind ones the divergence's `forward_kl_share`; all else in it takes the tail as
    one bucket. With blind draws D has a constant more, unless the target holds the tail's entropy.
    T = 0 is allowed: everything is zero, gradients too.

    Raises ConfigError where the target or the labels are missing, where `divergence` is a bare
    function, and where the target has draws alone, from which the divergence cannot learn: blind
    ones serve only forward KL and its multiples; ModelError where the vocabularies differ.
    """
    # refuse what cannot be computed
    _require_divergence(divergence)
    if ce_weight > 0.0 and labels_T is None:
        raise ConfigError(
            f"ce_weight is {ce_weight}, but there are no labels; pass labels_T, or set ce_weight "
            "= 0"
        )
    usable = None
    if divergence_weight > 0.0:
        usable = _usable(target, head, divergence, divergence_weight=divergence_weight)
    # one pass over the head; a term without weight is left out
    sums = head_loss(
        hidden_TH,
        head,
        target=usable,
        labels_T=labels_T if ce_weight > 0.0 else None,
        objective=Objective(divergence, divergence_weight, ce_weight, z_loss_weight),
        block_tokens=block_tokens,
    )
    return LossTerms(*sums, num_tokens=torch.tensor(hidden_TH.shape[0], device=hidden_TH.device))


def _require_divergence(divergence: object) -> None:
    if not isinstance(divergence, Divergence):
        name = getattr(divergence, "__name__", repr(divergence))
        raise ConfigError(
            f"divergence is {name}, a bare function, which does not say what share of forward KL "
            f"it holds; pass Divergence({name}), or Divergence({name}, forward_kl_share=1.0) where "
            "forward KL is a part of it"
        )


def _usable(
    target: CompressedLogits | None, head: Head, divergence: Divergence, *, divergence_weight: float
) -> CompressedLogits:
    """The target, without its draws where the divergence does not use them. Raises as
    `distillation_loss` does."""
    if target is None:
        raise ConfigError(
            f"divergence_weight is {divergence_weight}, but there is no target; pass one, or set "
            "divergence_weight = 0"
        )
    if target.vocab_size != head.vocab_size:
        raise ModelError(
            f"the target is over {target.vocab_size} tokens, the student's head over "
            f"{head.vocab_size}; slice the head to the tokenizer's highest id + 1, or use targets "
            "of the same vocabulary"
        )
    # draws alone are one bucket of mass 1: what they do not serve would be left out in silence
    weighted = target.draw_logprobs_TN is not None
    is_unbiased = is_unbiased_with_draws(divergence, weighted=weighted)
    if target.num_draws and target.k == 0 and not is_unbiased:
        wanted = "a divergence with a generator" if weighted else "only forward_kl"
        raise ConfigError(
            f"the target is {target.num_draws} draws and no exact entries, which {wanted} can "
            "learn from; use it, or keep entries"
        )
    if weighted:
        return target if divergence.tail_generator is not None else target.without_draws()
    return target if divergence.forward_kl_share else target.without_draws()
