"""Weighted draws from the tail: what they add to a divergence of buckets, so that it is that of the
whole vocabulary in expectation.

An f-divergence is a sum over ids of p g(r), with r = q / p and g convex (Csiszar 1967). Of the
tail, whose ratio as one bucket is r0 = q_tail / p_tail, a bucket sees p_tail g(r0). What it leaves
out is a Bregman divergence, since over the tail the sum of p (r - r0) is 0:

    sum over the tail of p B(r),    B(r) = g(r) - g(r0) - g'(r0) (r - r0) >= 0

Draws with weights w estimate that sum without bias, in value and in gradient. The estimate is never
below 0, and it is 0 with a gradient of 0 where the student has the teacher's probabilities: the
noise of the draws vanishes as the student nears.

All is in logarithms: with x = log r, and g a function of x, B is g(x) - g(x0) - g'(x0) expm1(x -
x0). So r0 may be 0.

Shapes: T tokens, N draws.
"""

from dataclasses import replace

import torch
from torch import Tensor

from stillhouse.logits import CompressedLogits
from stillhouse.logits.weights import draw_log_weights
from stillhouse.losses.divergences import Generator

LEAST_LOGPROB = -60.0
"""Nats. A draw of less counts as of that: its ratio, and the square of it, stay within float32. A
tail of less is one bucket."""


def tail_rest(
    target: CompressedLogits, within_TN: Tensor, logq_tail_T1: Tensor, *, generator: Generator
) -> Tensor:
    """What the tail adds to the divergence of the buckets, [T], by weighted draws.

    `within_TN`: log(q / q_tail) of each draw; `logq_tail_T1`: log q_tail. Both at the target's
    temperature. Differentiable in both.
    """
    of_tail_T1, beyond_TN = _logratios(target, within_TN, logq_tail_T1)
    value_T1, slope_T1 = _value_and_slope(generator, of_tail_T1)
    rest_TN = generator(of_tail_T1 + beyond_TN) - value_T1 - slope_T1 * beyond_TN.expm1()
    return (_log_weights(target).to(rest_TN.dtype).exp() * rest_TN).sum(dim=1)


def extremes(target: CompressedLogits, within_TN: Tensor, logq_tail_T1: Tensor) -> Tensor:
    """[2]: over all draws, the largest log(q / p) and the largest w q / p; each at least 0.

    The first alone is no alarm: a draw with a tiny p has a weight as small. The second is the mass
    of the student that one draw stands for: above 1, single draws decide the gradient.
    """
    of_tail_T1, beyond_TN = _logratios(target, within_TN, logq_tail_T1)
    logratio_TN = of_tail_T1 + beyond_TN
    mass_TN = (_log_weights(target).to(logratio_TN.dtype) + logratio_TN).exp()
    largest = (torch.cat([x.flatten(), x.new_zeros(1)]).max() for x in (logratio_TN, mass_TN))
    return torch.stack([*largest])


def _logratios(
    target: CompressedLogits, within_TN: Tensor, logq_tail_T1: Tensor
) -> tuple[Tensor, Tensor]:
    """log r0 of each token, and log r - log r0 of each draw; 0 without a tail."""
    logp_tail_T1 = target.tail_logmass_T[:, None].to(within_TN.dtype)
    logp_TN = _logprobs(target).to(within_TN.dtype)
    has_tail_T1 = logp_tail_T1 > LEAST_LOGPROB
    logp_tail_T1 = logp_tail_T1.clamp(min=LEAST_LOGPROB)
    return (
        torch.where(has_tail_T1, logq_tail_T1 - logp_tail_T1, 0.0),
        torch.where(has_tail_T1, within_TN - (logp_TN - logp_tail_T1), 0.0),
    )


def _logprobs(target: CompressedLogits) -> Tensor:
    assert target.draw_logprobs_TN is not None, "blind draws have no log-probabilities"
    return target.draw_logprobs_TN.clamp(min=LEAST_LOGPROB)


def _log_weights(target: CompressedLogits) -> Tensor:
    return draw_log_weights(replace(target, draw_logprobs_TN=_logprobs(target)))


def _value_and_slope(generator: Generator, at_T1: Tensor) -> tuple[Tensor, Tensor]:
    """g and its derivative; both differentiable where `at_T1` is."""
    is_needed = at_T1.requires_grad and torch.is_grad_enabled()
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaf_T1 = at_T1 if is_needed else at_T1.detach().clone().requires_grad_()
        value_T1 = generator(leaf_T1)
        (slope_T1,) = torch.autograd.grad(value_T1.sum(), leaf_T1, create_graph=is_needed)
    return (value_T1, slope_T1) if is_needed else (value_T1.detach(), slope_T1)
