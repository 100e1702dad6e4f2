"""The loss of a student: the weighted sum of a divergence, cross-entropy and the z-loss over
tokens.

Shapes: T tokens, H hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.errors import ConfigError, ModelError
from stillhouse.logits import CompressedLogits, Head
from stillhouse.losses.divergences import Divergence, is_unbiased_with_draws
from stillhouse.losses.fused_head import head_loss
from stillhouse.losses.sparse_gradient import Objective


class LossTerms(NamedTuple):
    """Sums over tokens, each a tensor without dimensions; only `total` carries a gradient."""

    # divergence_weight * temperature^2 * divergence + ce_weight * cross_entropy + z_loss_weight *
    # z_loss
    total: Tensor
    divergence: (
        Tensor  # nats at the target's temperature, unweighted; 0 where divergence_weight is 0
    )
    cross_entropy: Tensor  # nats at temperature 1, unweighted; 0 where ce_weight is 0
    # log-sum-exp of the student's logits at temperature 1, squared, unweighted; 0 where
    # z_loss_weight is 0
    z_loss: Tensor
    num_tokens: Tensor  # int64


def distillation_loss(
    hidden_TH: Tensor,
    head: Head,
    target: CompressedLogits | None,
    *,
    divergence: Divergence,
    labels_T: Tensor | None = None,
    ce_weight: float = 0.0,
    divergence_weight: float = 1.0,
    z_loss_weight: float = 0.0,
    block_tokens: int | None = None,
) -> LossTerms:
    """SUMS over T of `divergence_weight * temperature^2 * D(teacher || student) + ce_weight *
    CE(labels) + z_loss_weight * lse^2`.

    Draws from the tail serve the divergence's `forward_kl_share`; all else in it takes the tail as
    one bucket.

    The student's distribution is taken at the target's temperature, and temperature^2 is applied so
    that gradients keep their size (Hinton et al. 2015, arXiv 1503.02531, section 2). Cross-entropy
    and lse, the log-sum-exp of the student's logits, which the z-loss keeps near 0 (PaLM, arXiv
    2204.02311, section 5: weight 1e-4), are at temperature 1. T = 0 is fine: all is zero, gradients
    too. `target` may be None where `divergence_weight` is 0, `labels_T` (integers) where
    `ce_weight` is 0. Blocks and memory: see `head_loss`.

    Raises ConfigError where the target or the labels lack, `divergence` is a bare function, or the
    target has draws alone and `divergence` is more than its share of forward KL; ModelError where
    the vocabularies differ.
    """
    _require_divergence(divergence)
    if ce_weight > 0.0 and labels_T is None:
        raise ConfigError(
            f"ce_weight is {ce_weight}, but there are no labels; pass labels_T, or set ce_weight "
            "= 0"
        )
    if divergence_weight > 0.0:
        target = _usable(target, head, divergence, divergence_weight=divergence_weight)
    objective = Objective(
        divergence,
        divergence_weight=divergence_weight,
        ce_weight=ce_weight,
        z_loss_weight=z_loss_weight,
    )
    sums = head_loss(
        hidden_TH,
        head,
        target=target if divergence_weight > 0.0 else None,
        labels_T=labels_T if ce_weight > 0.0 else None,
        objective=objective,
        block_tokens=block_tokens,
    )
    return LossTerms(*sums, num_tokens=torch.tensor(hidden_TH.shape[0], device=hidden_TH.device))


def _require_divergence(divergence: object) -> None:
    if not isinstance(divergence, Divergence):
        name = getattr(divergence, "__name__", repr(divergence))
        raise ConfigError(
            f"divergence is {name}, a bare function, which does not say what share of forward KL "
            f"it holds; pass Divergence({name}),"
            f" or Divergence({name}, forward_kl_share=1.0) where forward KL is a part of it"
        )


def _usable(
    target: CompressedLogits | None, head: Head, divergence: Divergence, *, divergence_weight: float
) -> CompressedLogits:
    """The target, without its draws where the divergence holds no forward KL.

    Draws alone have one bucket, of mass 1, from which nothing can be learnt: they serve multiples
    of forward KL alone, since of any other divergence they would leave a part out without a word.
    """
    if target is None:
        raise ConfigError(
            f"divergence_weight is {divergence_weight}, but there is no target; pass one, or set "
            "divergence_weight = 0"
        )
    if target.vocab_size != head.vocab_size:
        raise ModelError(
            f"the target is over {target.vocab_size} tokens, the student's head over "
            f"{head.vocab_size}; "
            "slice the head to the tokenizer's highest id + 1, or use targets of the same "
            "vocabulary"
        )
    if target.num_draws == 0:
        return target
    if target.k == 0 and not is_unbiased_with_draws(divergence):
        raise ConfigError(
            f"the target is {target.num_draws} draws and no exact entries, which only forward_kl "
            "can learn from; use it, or keep entries"
        )
    return target if divergence.forward_kl_share else target.without_draws()
