"""What the student learns from: divergences between bucketed distributions, and the weighted sum of one of them with cross-entropy.

A divergence sees, for each token, the K kept entries and one bucket of all the others, never renormalised: so every divergence here is a
lower bound of the same divergence of the full distributions, and is 0 only where the buckets agree.

Forward KL falls into that of the buckets and p_tail times that within the tail. Where the target has draws from the teacher's tail, it
uses them for the second part, with p_tail times the entropy of the teacher's tail on top, which is not stored. So its gradient is that of
the full distributions in expectation; its value is too, but for that constant: it does not fall to 0, and with K = 0 it is the
cross-entropy of the whole teacher (RS-KD, arXiv 2503.16870). A divergence that holds forward KL as a part says so (`forward_kl_share`),
and that part uses the draws alike; whatever else it holds sees the tail as one bucket.

Shapes: T tokens, K kept entries, K1 = K + 1 buckets with the tail last, H hidden.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.errors import ConfigError, ModelError
from stillhouse.logits import CompressedLogits, Head
from stillhouse.losses.fused_head import head_loss
from stillhouse.losses.sparse_gradient import Divergence, Objective


class LossTerms(NamedTuple):
    """Sums over tokens, each a tensor without dimensions; only `total` carries a gradient."""

    total: Tensor  # divergence_weight * temperature^2 * divergence + ce_weight * cross_entropy + z_loss_weight * z_loss
    divergence: Tensor  # nats at the target's temperature, unweighted; 0 where divergence_weight is 0
    cross_entropy: Tensor  # nats at temperature 1, unweighted; 0 where ce_weight is 0
    z_loss: Tensor  # log-sum-exp of the student's logits at temperature 1, squared, unweighted; 0 where z_loss_weight is 0
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
    """SUMS over T of `divergence_weight * temperature^2 * D(teacher || student) + ce_weight * CE(labels) + z_loss_weight * lse^2`.

    Draws from the tail serve the divergence's `forward_kl_share`; all else in it takes the tail as one bucket.

    The student's distribution is taken at the target's temperature, and temperature^2 is applied so that gradients keep their size
    (Hinton et al. 2015, arXiv 1503.02531, section 2). Cross-entropy and lse, the log-sum-exp of the student's logits, which the z-loss
    keeps near 0 (PaLM, arXiv 2204.02311, section 5: weight 1e-4), are at temperature 1. T = 0 is fine: all is zero, gradients too.
    `target` may be None where `divergence_weight` is 0, `labels_T` (integers) where `ce_weight` is 0. Blocks and memory: see `head_loss`.

    Raises ConfigError where the target or the labels lack, `divergence` is a bare function, or the target has draws alone and `divergence`
    is more than its share of forward KL; ModelError where the vocabularies differ.
    """
    _require_divergence(divergence)
    if ce_weight > 0.0 and labels_T is None:
        raise ConfigError(f"ce_weight is {ce_weight}, but there are no labels; pass labels_T, or set ce_weight = 0")
    if divergence_weight > 0.0:
        target = _usable(target, head, divergence, divergence_weight=divergence_weight)
    objective = Objective(divergence, divergence_weight=divergence_weight, ce_weight=ce_weight, z_loss_weight=z_loss_weight)
    sums = head_loss(
        hidden_TH,
        head,
        target=target if divergence_weight > 0.0 else None,
        labels_T=labels_T if ce_weight > 0.0 else None,
        objective=objective,
        block_tokens=block_tokens,
    )
    return LossTerms(*sums, num_tokens=torch.tensor(hidden_TH.shape[0], device=hidden_TH.device))


def divergence_named(name: str, mix: float) -> Divergence:
    """The divergence of a config's name; `mix` is beta of jsd and alpha of the skewed ones, unused by the others. Raises ConfigError."""
    match name:
        case "forward_kl":
            return forward_kl
        case "reverse_kl":
            return reverse_kl
        case "jsd":
            return jsd(mix)
        case "skew_forward_kl":
            return skew_forward_kl(mix)
        case "skew_reverse_kl":
            return skew_reverse_kl(mix)
        case "tvd":
            return tvd
    raise ConfigError(f"no divergence '{name}'; known: forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd")


def _kl(loga_TK1: Tensor, logb_TK1: Tensor) -> Tensor:
    return (loga_TK1.exp() * (loga_TK1 - logb_TK1)).sum(dim=-1)


def _reverse_kl(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    return _kl(logq_TK1, logp_TK1)


def _total_variation(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    return 0.5 * (logp_TK1.exp() - logq_TK1.exp()).abs().sum(dim=-1)


forward_kl = Divergence(_kl, forward_kl_share=1.0)
"""KL(p || q) = sum p log(p / q): covers all that the teacher does (Hinton et al. 2015). With draws unbiased."""

reverse_kl = Divergence(_reverse_kl)
"""KL(q || p) = sum q log(q / p): keeps to what the teacher does (MiniLLM, arXiv 2306.08543)."""

tvd = Divergence(_total_variation)
"""Total variation distance, half of sum |p - q|: bounded gradients (f-distill, arXiv 2307.15190)."""


def jsd(beta: float) -> Divergence:
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    Raises ConfigError unless 0 < beta < 1: at either end it is 0 for every student.
    """
    _require_proper_mix("jsd", beta)

    def divergence(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
        logm_TK1 = _log_mixture(logp_TK1, logq_TK1, weight_of_a=beta)
        return beta * _kl(logp_TK1, logm_TK1) + (1.0 - beta) * _kl(logq_TK1, logm_TK1)

    return Divergence(divergence)


def skew_forward_kl(alpha: float) -> Divergence:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898). Raises ConfigError unless 0 < alpha < 1."""
    _require_proper_mix("skew_forward_kl", alpha)
    return Divergence(lambda logp_TK1, logq_TK1: _kl(logp_TK1, _log_mixture(logp_TK1, logq_TK1, weight_of_a=alpha)))


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv 2402.03898). Raises ConfigError unless 0 < alpha < 1."""
    _require_proper_mix("skew_reverse_kl", alpha)
    return Divergence(lambda logp_TK1, logq_TK1: _kl(logq_TK1, _log_mixture(logq_TK1, logp_TK1, weight_of_a=alpha)))


def is_unbiased_with_draws(divergence: Divergence) -> bool:
    """Whether draws complete the divergence, so that its gradient is the whole vocabulary's in expectation.

    That is so where it is `forward_kl_share` times forward KL and nothing else, as it proves on a fixed pair of distributions.
    """
    if divergence.forward_kl_share == 0.0:
        return False
    logp_12, logq_12 = (torch.tensor([[mass, 1.0 - mass]], dtype=torch.float64).log() for mass in (0.3, 0.6))
    return torch.allclose(divergence.of(logp_12, logq_12), divergence.forward_kl_share * _kl(logp_12, logq_12), rtol=1e-6, atol=0.0)


def _log_mixture(loga_TK1: Tensor, logb_TK1: Tensor, *, weight_of_a: float) -> Tensor:
    return torch.logaddexp(loga_TK1 + math.log(weight_of_a), logb_TK1 + math.log1p(-weight_of_a))


def _require_proper_mix(name: str, mix: float) -> None:
    if not 0.0 < mix < 1.0:
        raise ConfigError(
            f"mix is {mix}, but {name} wants it strictly between 0 and 1; for the limits choose forward_kl or reverse_kl as the divergence"
        )


def _require_divergence(divergence: object) -> None:
    if not isinstance(divergence, Divergence):
        name = getattr(divergence, "__name__", repr(divergence))
        raise ConfigError(
            f"divergence is {name}, a bare function, which does not say what share of forward KL it holds; pass Divergence({name}),"
            f" or Divergence({name}, forward_kl_share=1.0) where forward KL is a part of it"
        )


def _usable(target: CompressedLogits | None, head: Head, divergence: Divergence, *, divergence_weight: float) -> CompressedLogits:
    """The target, without its draws where the divergence holds no forward KL.

    Draws alone have one bucket, of mass 1, from which nothing can be learnt: they serve multiples of forward KL alone, since of any other
    divergence they would leave a part out without a word.
    """
    if target is None:
        raise ConfigError(f"divergence_weight is {divergence_weight}, but there is no target; pass one, or set divergence_weight = 0")
    if target.vocab_size != head.vocab_size:
        raise ModelError(
            f"the target is over {target.vocab_size} tokens, the student's head over {head.vocab_size}; "
            "slice the head to the tokenizer's highest id + 1, or use targets of the same vocabulary"
        )
    if target.num_draws == 0:
        return target
    if target.k == 0 and not is_unbiased_with_draws(divergence):
        raise ConfigError(
            f"the target is {target.num_draws} draws and no exact entries, which only forward_kl can learn from; use it, or keep entries"
        )
    return target if divergence.forward_kl_share else target.without_draws()
