"""Divergences of teacher p and student q on sparse targets: forward and reverse KL, skewed KL,
Jensen-Shannon (JSD) and total variation (TVD).

A target keeps K entries of the teacher's distribution. All other ids, the tail, are one bucket. A
divergence is a function of the log-masses of these K + 1 buckets, which are never renormalised:

    divergence.of(logp_TK1, logq_TK1) -> loss_T    # nats

Merging ids into a bucket never raises an f-divergence (data processing inequality). So each of the
six here is at most its value on the whole vocabulary, and is 0 only where the buckets agree.

Draws from the tail (RS-KD, random-sampled distillation, arXiv 2503.16870) complete forward KL,

    KL(p || q) = KL of the buckets + p_tail * KL within the tail,

since they estimate the second term without bias, up to p_tail times the entropy of the teacher's
tail, a constant that few targets store. So the gradient is that of the whole vocabulary in
expectation, but without the constant the value does not fall to 0; with K = 0 it is the
cross-entropy of the whole teacher. `sparse_gradient` adds the term as many times as a divergence
holds forward KL.

Weighted draws, which have their log-probabilities, complete every divergence that has a
`generator`: see `weighted_draws`.

Shapes: T tokens, K kept entries, K1 = K + 1 buckets with the tail last.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.errors import ConfigError
from stillhouse.extension import extension_digest, is_extension, load_extension

# nats; the log of no mass at all: exp(-100) is below every float32 that is not subnormal
LOG_FLOOR = -100.0

Generator = Callable[[Tensor], Tensor]


class Divergence(NamedTuple):
    """A divergence of teacher and student, and what completes it where a target has draws.

    `of(logp_TK1, logq_TK1) -> loss_T`: log-masses of the same buckets, the teacher's first, with
    the tail last; nats, differentiable in logq_TK1. No log p is below LOG_FLOOR, so none is -inf.

    `forward_kl_share`: how many times `of` holds forward KL. 1 for forward KL itself and for its
    sum with anything else, 0.5 for half of it. Where the target has blind draws, that part has the
    gradient of the whole vocabulary in expectation. All else in `of` sees the tail as one bucket.

    `generator`: g of an f-divergence, as a function of log(q / p) and elementwise: `of` is the sum
    of p g(log(q / p)) for distributions p and q, and g(0) = 0. Twice differentiable but for single
    points. With it, weighted draws give the divergence the value and the gradient of the whole
    vocabulary in expectation. None: they serve the `forward_kl_share` alone.

        def squared_hellinger(logp_TK1, logq_TK1):
            return 1.0 - (0.5 * (logp_TK1 + logq_TK1)).exp().sum(dim=-1)

        def generator(logratio):
            return 0.5 * torch.expm1(0.5 * logratio).square()

        own = Divergence(squared_hellinger, generator=generator)
        distillation_loss(hidden_TH, head, target, divergence=own)

    Any multiple of q / p - 1 may be added to g, whose sum over a distribution is 0. Where that
    makes g flat at 0, as it is here, every term is at least 0 and keeps its digits near q = p.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    forward_kl_share: float = 0.0
    generator: Generator | None = None

    @property
    def tail_generator(self) -> Generator | None:
        """The generator of what weighted draws complete: the divergence, or only the part of it
        that is forward KL; None where that is nothing."""
        share = self.forward_kl_share
        if self.generator is not None or share == 0.0:
            return self.generator
        return lambda logratio: share * _forward_kl_generator(logratio)


def _kl(loga_TK1: Tensor, logb_TK1: Tensor) -> Tensor:
    return (loga_TK1.exp() * (loga_TK1 - logb_TK1)).sum(dim=-1)


def _reverse_kl(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    return _kl(logq_TK1, logp_TK1)


def _total_variation(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    return 0.5 * (logp_TK1.exp() - logq_TK1.exp()).abs().sum(dim=-1)


def _log_mixture(loga_TK1: Tensor, logb_TK1: Tensor, *, weight_of_a: float) -> Tensor:
    return torch.logaddexp(loga_TK1 + math.log(weight_of_a), logb_TK1 + math.log1p(-weight_of_a))


# Each is flat at 0: see `Divergence`. In expm1 and log1p, so that it is exactly 0 there.


def _forward_kl_generator(logratio: Tensor) -> Tensor:
    return logratio.expm1() - logratio


def _reverse_kl_generator(logratio: Tensor) -> Tensor:
    return logratio.exp() * logratio - logratio.expm1()


def _total_variation_generator(logratio: Tensor) -> Tensor:
    return 0.5 * logratio.expm1().abs()


def _log_mixed_ratio(logratio: Tensor, *, weight_of_q: float) -> Tensor:
    """log(m / p), where m is the mixture of q, with this weight, and p."""
    return (weight_of_q * logratio.expm1()).log1p()


forward_kl = Divergence(_kl, forward_kl_share=1.0, generator=_forward_kl_generator)
"""KL(p || q) = sum p log(p / q). Mode-covering (Hinton et al. 2015, arXiv 1503.02531). The one
divergence that blind draws make unbiased."""

reverse_kl = Divergence(_reverse_kl, generator=_reverse_kl_generator)
"""KL(q || p) = sum q log(q / p). Mode-seeking (MiniLLM, arXiv 2306.08543)."""

tvd = Divergence(_total_variation, generator=_total_variation_generator)
"""Total variation distance, sum |p - q| / 2. Its gradients are bounded (f-distill, arXiv
2307.15190)."""


def jsd(beta: float) -> Divergence:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649).

    beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q. Raises ConfigError
    unless 0 < beta < 1: at either end it is 0 for every student.
    """
    _require_proper_mix("jsd", beta)

    def jensen_shannon(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
        logm_TK1 = _log_mixture(logp_TK1, logq_TK1, weight_of_a=beta)
        return beta * _kl(logp_TK1, logm_TK1) + (1.0 - beta) * _kl(logq_TK1, logm_TK1)

    def generator(logratio: Tensor) -> Tensor:
        log_mixed = _log_mixed_ratio(logratio, weight_of_q=1.0 - beta)
        return (1.0 - beta) * logratio.exp() * (logratio - log_mixed) - beta * log_mixed

    return Divergence(jensen_shannon, generator=generator)


def skew_forward_kl(alpha: float) -> Divergence:
    """Skewed forward KL, KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898).

    Raises ConfigError unless 0 < alpha < 1.
    """
    _require_proper_mix("skew_forward_kl", alpha)

    def skewed(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
        return _kl(logp_TK1, _log_mixture(logp_TK1, logq_TK1, weight_of_a=alpha))

    def generator(logratio: Tensor) -> Tensor:
        log_mixed = _log_mixed_ratio(logratio, weight_of_q=1.0 - alpha)
        return (1.0 - alpha) * logratio.expm1() - log_mixed

    return Divergence(skewed, generator=generator)


def skew_reverse_kl(alpha: float) -> Divergence:
    """Skewed reverse KL, KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv 2402.03898).

    Raises ConfigError unless 0 < alpha < 1.
    """
    _require_proper_mix("skew_reverse_kl", alpha)

    def skewed(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
        return _kl(logq_TK1, _log_mixture(logq_TK1, logp_TK1, weight_of_a=alpha))

    def generator(logratio: Tensor) -> Tensor:
        log_mixed = _log_mixed_ratio(logratio, weight_of_q=alpha)
        return logratio.exp() * (logratio - log_mixed) - (1.0 - alpha) * logratio.expm1()

    return Divergence(skewed, generator=generator)


_BUILT_IN: dict[str, Callable[[float], Divergence]] = {
    "forward_kl": lambda _mix: forward_kl,
    "reverse_kl": lambda _mix: reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": lambda _mix: tvd,
}


def divergence_named(name: str, mix: float = 0.5) -> Divergence:
    """The divergence of a name: forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd,
    or "package.module:name" for one of your own.

    `mix` is beta of jsd and alpha of the skewed KLs, strictly between 0 and 1; the others do not
    use it. Raises ConfigError for an unknown name, a mix out of range, and where the name is of one
    of your own that is no usable Divergence.

        divergence_named("jsd", 0.1).of(logp_TK1, logq_TK1)    # [T], nats
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name](mix)
    if is_extension(name):
        return _proven(load_extension(name, setting="student.divergence"), name)
    raise ConfigError(f"no divergence '{name}'; known: {', '.join(_BUILT_IN)}")


def divergence_identity(name: str) -> str:
    """What a checkpoint holds of a divergence: its name, and the digest of its file where it is of
    the user's own."""
    return f"{name}@{extension_digest(name)}" if is_extension(name) else name


def is_unbiased_with_draws(divergence: Divergence, *, weighted: bool = False) -> bool:
    """Whether draws give the divergence the gradient of the whole vocabulary in expectation.

    Weighted ones do where it has a generator; all do where it is `forward_kl_share` times forward
    KL and nothing else, which is tried on one pair of distributions.
    """
    if weighted and divergence.generator is not None:
        return True
    if divergence.forward_kl_share == 0.0:
        return False
    logp_12, logq_12 = (
        torch.tensor([[mass, 1.0 - mass]], dtype=torch.float64).log() for mass in (0.3, 0.6)
    )
    wanted_1 = divergence.forward_kl_share * _kl(logp_12, logq_12)
    return torch.allclose(divergence.of(logp_12, logq_12), wanted_1, rtol=1e-6, atol=0.0)


def _proven(found: Any, name: str) -> Divergence:
    """A divergence of the user's own, tried on two tokens. Raises ConfigError where it is none."""
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
            "log-masses of [2, 3]; wanted a finite loss for each token, [2], differentiable in the "
            "second argument"
        )
    if found.generator is not None:
        _require_generator_of(found, found.generator, name)
    return found


def _require_generator_of(divergence: Divergence, generator: Generator, name: str) -> None:
    """Raise ConfigError unless the generator is that of the divergence, tried on two tokens."""
    logp_TK1 = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    logq_TK1 = torch.tensor([[0.1, 0.8, 0.1], [0.3, 0.2, 0.5]], dtype=torch.float64).log()
    logratio_TK1 = (logq_TK1 - logp_TK1).requires_grad_()
    terms_TK1, at_0 = generator(logratio_TK1), generator(torch.zeros(1, dtype=torch.float64))
    wanted_T = divergence.of(logp_TK1, logq_TK1)
    is_sound = (
        terms_TK1.shape == logratio_TK1.shape
        and terms_TK1.requires_grad
        and bool(at_0.abs().max() < 1e-6)
        and torch.allclose(
            (logp_TK1.exp() * terms_TK1).sum(dim=1), wanted_T.to(terms_TK1.dtype), rtol=1e-4
        )
    )
    if not is_sound:
        raise ConfigError(
            f'student.divergence is "{name}", whose `generator` is not that of its `of`; wanted g, '
            "elementwise and differentiable, with g(0) = 0 and the sum of p g(log(q / p)) equal to "
            "`of`. Mend it, or leave it out: then weighted draws are not used"
        )


def _require_proper_mix(name: str, mix: float) -> None:
    if not 0.0 < mix < 1.0:
        raise ConfigError(
            f"mix is {mix}, but {name} wants it strictly between 0 and 1; for the limits choose "
            "forward_kl or reverse_kl as the divergence"
        )
