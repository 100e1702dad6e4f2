"""Divergences between bucketed distributions: the type, and six instances.

A divergence sees, for each token, the K kept entries and one bucket of all the others, never
renormalised: so every divergence here is a lower bound of the same divergence of the full
distributions, and is 0 only where the buckets agree.

Forward KL falls into that of the buckets and p_tail times that within the tail. Where the target
has draws from the teacher's tail, it uses them for the second part, with p_tail times the entropy
of the teacher's tail on top, which is not stored. So its gradient is that of the full distributions
in expectation; its value is too, but for that constant: it does not fall to 0, and with K = 0 it is
the cross-entropy of the whole teacher (RS-KD, arXiv 2503.16870). A divergence that holds forward KL
as a part says so (`forward_kl_share`), and that part uses the draws alike; whatever else it holds
sees the tail as one bucket.

Shapes: T tokens, K kept entries, K1 = K + 1 buckets with the tail last, H hidden.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.errors import ConfigError
from stillhouse.extension import extension_digest, is_extension, load_extension

# nats; stands for no mass at all: exp(-100) is below every float32 that is not subnormal
LOG_FLOOR = -100.0


class Divergence(NamedTuple):
    """A distance between teacher and student, and how much of it draws from the tail can complete.

    `of` is (logp_TK1, logq_TK1) -> loss_T: teacher's and student's log-masses of the same buckets,
    the tail's last. No log p is below LOG_FLOOR, so none is -inf.

    `forward_kl_share` is how many times the divergence holds forward KL: 1 for forward KL itself
    and for its sum with another divergence, 0.5 for half of it. That part has the whole
    vocabulary's gradient in expectation where the target has draws. The rest, and all of a
    divergence of share 0, sees the tail as one bucket.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    forward_kl_share: float = 0.0


def divergence_named(name: str, mix: float) -> Divergence:
    """The divergence that a config names; `mix` is beta of jsd and alpha of the skewed ones, unused
    by the others.

    Raises ConfigError for an unknown name, and for one of the user's own that is no usable
    Divergence.
    """
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
    if is_extension(name):
        return _proven(load_extension(name, setting="student.divergence"), name)
    raise ConfigError(
        f"no divergence '{name}'; known: forward_kl, reverse_kl, jsd, skew_forward_kl, "
        "skew_reverse_kl, tvd"
    )


def divergence_identity(name: str) -> str:
    """What a checkpoint remembers: the name, and for one of the user's own the digest of its
    file."""
    return f"{name}@{extension_digest(name)}" if is_extension(name) else name


def _proven(found: Any, name: str) -> Divergence:
    """The user's own divergence, tried on two tokens. Raises ConfigError where it is none."""
    if not isinstance(found, Divergence):
        raise ConfigError(
            f'student.divergence is "{name}", a {type(found).__name__}; wanted a '
            "stillhouse.losses.divergences.Divergence"
        )
    logp_TK1 = torch.tensor([[0.6, 0.3, 0.1], [1.0, 0.0, 0.0]]).log().clamp(min=LOG_FLOOR)
    logq_TK1 = torch.tensor([[0.2, 0.3, 0.5], [0.4, 0.4, 0.2]]).log().requires_grad_()
    loss_T = found.of(logp_TK1, logq_TK1)
    if loss_T.shape != (2,) or not (loss_T.isfinite().all() and loss_T.requires_grad):
        raise ConfigError(
            f'student.divergence is "{name}", whose `of` gives {list(loss_T.shape)} for '
            "log-masses of [2, 3]; wanted a finite loss for each"
            " token, [2], differentiable in the second argument"
        )
    return found


def _kl(loga_TK1: Tensor, logb_TK1: Tensor) -> Tensor:
    return (loga_TK1.exp() * (loga_TK1 - logb_TK1)).sum(dim=-1)


def _reverse_kl(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    return _kl(logq_TK1, logp_TK1)


def _total_variation(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    return 0.5 * (logp_TK1.exp() - logq_TK1.exp()).abs().sum(dim=-1)


forward_kl = Divergence(_kl, forward_kl_share=1.0)
"""KL(p || q) = sum p log(p / q): covers all that the teacher does (Hinton et al. 2015). With draws
unbiased."""

reverse_kl = Divergence(_reverse_kl)
"""KL(q || p) = sum q log(q / p): keeps to what the teacher does (MiniLLM, arXiv 2306.08543)."""

tvd = Divergence(_total_variation)
"""Total variation distance, half of sum |p - q|: bounded gradients (f-distill, arXiv
2307.15190)."""


def jsd(beta: float) -> Divergence:
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta)
    q (GKD, arXiv 2306.13649).

    Raises ConfigError unless 0 < beta < 1: at either end it is 0 for every student.
    """
    _require_proper_mix("jsd", beta)

    def divergence(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
        logm_TK1 = _log_mixture(logp_TK1, logq_TK1, weight_of_a=beta)
        return beta * _kl(logp_TK1, logm_TK1) + (1.0 - beta) * _kl(logq_TK1, logm_TK1)

    return Divergence(divergence)


def skew_forward_kl(alpha: float) -> Divergence:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898). Raises ConfigError unless 0 <
    alpha < 1."""
    _require_proper_mix("skew_forward_kl", alpha)
    return Divergence(
        lambda logp_TK1, logq_TK1: _kl(
            logp_TK1, _log_mixture(logp_TK1, logq_TK1, weight_of_a=alpha)
        )
    )


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv 2402.03898). Raises ConfigError unless 0 <
    alpha < 1."""
    _require_proper_mix("skew_reverse_kl", alpha)
    return Divergence(
        lambda logp_TK1, logq_TK1: _kl(
            logq_TK1, _log_mixture(logq_TK1, logp_TK1, weight_of_a=alpha)
        )
    )


def is_unbiased_with_draws(divergence: Divergence) -> bool:
    """Whether draws complete the divergence, so that its gradient is the whole vocabulary's in
    expectation.

    That is so where it is `forward_kl_share` times forward KL and nothing else, as it proves on a
    fixed pair of distributions.
    """
    if divergence.forward_kl_share == 0.0:
        return False
    logp_12, logq_12 = (
        torch.tensor([[mass, 1.0 - mass]], dtype=torch.float64).log() for mass in (0.3, 0.6)
    )
    return torch.allclose(
        divergence.of(logp_12, logq_12),
        divergence.forward_kl_share * _kl(logp_12, logq_12),
        rtol=1e-6,
        atol=0.0,
    )


def _log_mixture(loga_TK1: Tensor, logb_TK1: Tensor, *, weight_of_a: float) -> Tensor:
    return torch.logaddexp(loga_TK1 + math.log(weight_of_a), logb_TK1 + math.log1p(-weight_of_a))


def _require_proper_mix(name: str, mix: float) -> None:
    if not 0.0 < mix < 1.0:
        raise ConfigError(
            f"mix is {mix}, but {name} wants it strictly between 0 and 1; for the limits choose "
            "forward_kl or reverse_kl as the divergence"
        )
