"""An LM head and a loss over its logits as one differentiable operation, in token blocks: the T x V logits never exist.

One gradient serves every divergence. A loss of the K kept entries and of the tail's mass changes the K kept logits one by one, and all
other logits of a token through ONE number, shared out by the softmax within the tail. That number comes from autograd on [C, K + 1]
tensors, so a divergence is five lines of torch. Gradients are made in the forward pass and scaled in the backward.

The tail is summed over its own logits, not taken as 1 minus the kept mass: it is exact however small it is.

Draws from the teacher's tail add the cross-entropy within it: p_tail times the mean of -log(q(draw) / q_tail). In expectation, that is
what forward KL over the whole vocabulary has beyond its buckets, but for the entropy of the teacher's tail, which no student changes.

Shapes: T tokens, C tokens of one block, K kept entries, K1 = K + 1 buckets with the tail last, N draws, V vocabulary, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillhouse.logits import CompressedLogits, Head

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(logp_TK1, logq_TK1) -> loss_T: teacher's and student's log-masses of the same buckets; no log p is below LOG_FLOOR, so none is -inf."""

LOG_FLOOR = -100.0  # nats; stands for no mass at all: exp(-100) is below every float32 that is not subnormal


@dataclass(frozen=True, slots=True)
class Objective:
    """What is summed over tokens: divergence_weight * temperature^2 * D + ce_weight * CE, D being the divergence of the buckets and, where
    the target has draws, the cross-entropy within the tail."""

    divergence: Divergence
    divergence_weight: float
    ce_weight: float


class Sums(NamedTuple):
    """Sums over tokens, each without dimensions, float32 (float64 where the weight is)."""

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def head_loss(
    hidden_TH: Tensor,
    head: Head,
    *,
    target: CompressedLogits | None,
    labels_T: Tensor | None,
    objective: Objective,
    block_tokens: int,
) -> Sums:
    """The objective's sums over T; `total` is differentiable in the hidden states and in the head's weight and bias.

    `target` None leaves the divergence out, `labels_T` None the cross-entropy. Gradients that nobody needs are not computed. The matrix
    products run in the weight's dtype, all else in float32, or in float64 where the weight is. Extra memory: one [block_tokens, V]
    float32 buffer, one more under a softcap, one more for cross-entropy beside a target of another temperature than 1, a copy in
    the weight's dtype where that is narrower; and the gradients.
    """
    assert target is None or target.num_tokens == hidden_TH.shape[0], "one target for each hidden state"
    assert labels_T is None or labels_T.shape == hidden_TH.shape[:1], "one label for each hidden state"
    work = _Work(head, target, labels_T, objective, block_tokens)
    return Sums(*_HeadLoss.apply(hidden_TH, head.weight_VH, head.bias_V, work, torch.is_grad_enabled()))


@dataclass(frozen=True, slots=True)
class _Work:
    head: Head
    target: CompressedLogits | None
    labels_T: Tensor | None
    objective: Objective
    block_tokens: int


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, work: _Work, grad_enabled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        needed_hidden, needed_weight, needed_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        grads = _Gradients(
            torch.empty_like(hidden_TH) if needed_hidden else None,
            torch.zeros_like(weight_VH, dtype=dtype) if needed_weight else None,
            torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needed_bias else None,
        )
        sums = _run_blocks(hidden_TH, work, grads=grads, dtype=dtype)
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden_TH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(sums.divergence, sums.cross_entropy)
        return sums.total, sums.divergence, sums.cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else (grad * grad_total).to(dtype) for grad, dtype in pairs), None, None


class _Gradients(NamedTuple):
    """Of `total`; None where nobody needs it. Filled in place, block by block."""

    hidden_TH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


def _run_blocks(hidden_TH: Tensor, work: _Work, *, grads: _Gradients, dtype: torch.dtype) -> Sums:
    head, objective = work.head, work.objective
    needed = any(grad is not None for grad in grads)
    sums_2 = torch.zeros(2, dtype=dtype, device=hidden_TH.device)
    for start in range(0, hidden_TH.shape[0], work.block_tokens):
        block = slice(start, start + work.block_tokens)
        hidden_CH = hidden_TH[block].to(head.weight_VH.dtype)
        logits_CV, slope_CV = _logits(hidden_CH, head, dtype=dtype)
        target = None if work.target is None else _rows(work.target, block)
        labels_C = None if work.labels_T is None else work.labels_T[block].long()
        sums_2 += _losses_(logits_CV, target, labels_C=labels_C, objective=objective, slope=head.scale, needed=needed)
        if needed:
            gradient_CV = logits_CV if slope_CV is None else logits_CV.mul_(slope_CV)
            _add_gradients_(grads, gradient_CV.to(head.weight_VH.dtype), hidden_CH=hidden_CH, weight_VH=head.weight_VH, block=block)
    temperature = 1.0 if work.target is None else work.target.temperature
    total = objective.divergence_weight * temperature**2 * sums_2[0] + objective.ce_weight * sums_2[1]
    return Sums(total, sums_2[0].clone(), sums_2[1].clone())


def _rows(target: CompressedLogits, block: slice) -> CompressedLogits:
    return target.map(lambda tensor: tensor[block])


def _logits(hidden_CH: Tensor, head: Head, *, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The logits, and the slope of the soft-capping at each of them; the scale's slope is left to the caller."""
    logits_CV = torch.nn.functional.linear(hidden_CH, head.weight_VH, head.bias_V).to(dtype)
    if head.scale != 1.0:
        logits_CV.mul_(head.scale)
    if head.softcap is None:
        return logits_CV, None
    logits_CV.div_(head.softcap).tanh_()
    slope_CV = logits_CV.square().neg_().add_(1.0)
    return logits_CV.mul_(head.softcap), slope_CV


def _losses_(
    logits_CV: Tensor,
    target: CompressedLogits | None,
    *,
    labels_C: Tensor | None,
    objective: Objective,
    slope: float,
    needed: bool,
) -> Tensor:
    """Sums of (divergence, cross-entropy). Turns the logits into slope * d total / d logits, where needed."""
    temperature = 1.0 if target is None else target.temperature
    if temperature == 1.0 or labels_C is None:
        scaled_CV = logits_CV if temperature == 1.0 else logits_CV.div_(temperature)
        return _losses_of_one_temperature_(scaled_CV, target, labels_C=labels_C, objective=objective, slope=slope, needed=needed)
    text_CV = logits_CV.clone()
    sums_2 = _losses_of_one_temperature_(text_CV, None, labels_C=labels_C, objective=objective, slope=slope, needed=needed)
    logits_CV.div_(temperature)
    sums_2 += _losses_of_one_temperature_(logits_CV, target, labels_C=None, objective=objective, slope=slope, needed=needed)
    if needed:
        logits_CV.add_(text_CV)
    return sums_2


def _losses_of_one_temperature_(
    logits_CV: Tensor,
    target: CompressedLogits | None,
    *,
    labels_C: Tensor | None,
    objective: Objective,
    slope: float,
    needed: bool,
) -> Tensor:
    """As `_losses_`, where the logits are already divided by the target's temperature."""
    sums_2 = logits_CV.new_zeros(2)
    ids_CK, draws = _entries(target, logits_CV)
    label_logits_C1 = None if labels_C is None else logits_CV.gather(1, labels_C[:, None])
    drawn_logits_CN = logits_CV.gather(1, draws.ids_CN)
    buckets = _buckets_(logits_CV, ids_CK)
    gradient_CK1 = torch.zeros_like(buckets.logq_CK1)
    weight = 0.0
    if target is not None:
        sums_2[0], gradient_CK1 = _divergence(target, buckets.logq_CK1, objective=objective, needed=needed)
        sums_2[0] += (draws.mass_C1 * (buckets.log_tail_C1 - drawn_logits_CN)).sum()
        weight = objective.divergence_weight * target.temperature * slope  # temperature^2, and the chain rule's 1 / temperature
    if label_logits_C1 is not None:
        sums_2[1] = (buckets.log_total_C1 - label_logits_C1).sum()
    if needed:
        _spread_(
            logits_CV,
            gradient_CK1 * weight,
            ids_CK=ids_CK,
            draws=draws._replace(mass_C1=draws.mass_C1 * weight),
            labels_C=labels_C,
            buckets=buckets,
            ce_weight=objective.ce_weight * slope,
        )
    return sums_2


class _Draws(NamedTuple):
    """From the teacher's tail; of a target without draws, none."""

    ids_CN: Tensor
    mass_C1: Tensor  # that each of them stands for: p_tail / N


def _entries(target: CompressedLogits | None, logits_CV: Tensor) -> tuple[Tensor, _Draws]:
    """The kept ids and the draws of a target; none of either without one."""
    if target is None:
        none_C0 = logits_CV.new_empty((logits_CV.shape[0], 0), dtype=torch.int64)
        return none_C0, _Draws(none_C0, logits_CV.new_zeros((logits_CV.shape[0], 1)))
    mass_C1 = target.tail_logmass_T[:, None].to(logits_CV.dtype).exp() / max(1, target.num_draws)
    return target.token_ids_TK.long(), _Draws(target.tail_ids_TN.long(), mass_C1)


class _Buckets(NamedTuple):
    logq_CK1: Tensor  # the student's log-masses
    log_total_C1: Tensor  # logsumexp of all the logits
    log_tail_C1: Tensor  # and of the tail's
    tail_sum_C1: Tensor  # sum of exp(logit - peak) over the tail's logits, peak being the highest of them


def _buckets_(logits_CV: Tensor, ids_CK: Tensor) -> _Buckets:
    """The student's buckets. Turns the logits into exp(logit - peak), with 0 at the kept ids."""
    kept_CK = logits_CV.gather(1, ids_CK)
    logits_CV.scatter_(1, ids_CK, torch.finfo(logits_CV.dtype).min)  # not -inf, which would make NaN of an empty tail
    peak_C1 = logits_CV.amax(dim=1, keepdim=True)
    tail_sum_C1 = logits_CV.sub_(peak_C1).exp_().sum(dim=1, keepdim=True)
    logits_CK1 = torch.cat([kept_CK, peak_C1 + tail_sum_C1.log()], dim=1)
    log_total_C1 = logits_CK1.logsumexp(dim=1, keepdim=True)
    logq_CK1 = logits_CK1 - log_total_C1
    if ids_CK.shape[1] == logits_CV.shape[1]:
        logq_CK1[:, -1] = LOG_FLOOR
    return _Buckets(logq_CK1, log_total_C1, logits_CK1[:, -1:], tail_sum_C1)


def _divergence(target: CompressedLogits, logq_CK1: Tensor, *, objective: Objective, needed: bool) -> tuple[Tensor, Tensor]:
    """The sum over tokens, and its gradient in log q (zeros where not needed)."""
    logp_CK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], dim=1).to(logq_CK1.dtype).clamp(min=LOG_FLOOR)
    if not needed:
        return objective.divergence(logp_CK1, logq_CK1).sum(), torch.zeros_like(logq_CK1)
    with torch.enable_grad():
        leaf_CK1 = logq_CK1.detach().requires_grad_()
        sum_0 = objective.divergence(logp_CK1, leaf_CK1).sum()
        (gradient_CK1,) = torch.autograd.grad(sum_0, leaf_CK1)
    return sum_0.detach(), gradient_CK1


def _spread_(
    masses_CV: Tensor,
    gradient_CK1: Tensor,
    *,
    ids_CK: Tensor,
    draws: _Draws,
    labels_C: Tensor | None,
    buckets: _Buckets,
    ce_weight: float,
) -> None:
    """From a gradient in log q to one in the logits, written over `masses_CV`, which holds what `_buckets_` left in it.

    A kept logit gets its own bucket's gradient through the softmax; the tail's is shared out by the softmax within the tail. Draws add
    the gradient of the cross-entropy within the tail: their mass, shared out in the same way, less each draw's at its own id.
    """
    q_CK1 = buckets.logq_CK1.exp()
    gradient_CK1 = gradient_CK1 - q_CK1 * gradient_CK1.sum(dim=1, keepdim=True)
    if labels_C is not None:
        gradient_CK1 += ce_weight * q_CK1
        gradient_CK1[:, :-1] -= ce_weight * (ids_CK == labels_C[:, None]).to(q_CK1.dtype)
    share_C1 = (gradient_CK1[:, -1:] + draws.mass_C1 * draws.ids_CN.shape[1]) / buckets.tail_sum_C1
    masses_CV.mul_(share_C1)
    masses_CV.scatter_add_(1, draws.ids_CN, -draws.mass_C1.expand_as(draws.ids_CN))
    if labels_C is not None:
        masses_CV.scatter_add_(1, labels_C[:, None], torch.full_like(share_C1, -ce_weight))
    masses_CV.scatter_(1, ids_CK, gradient_CK1[:, :-1])


def _add_gradients_(grads: _Gradients, gradient_CV: Tensor, *, hidden_CH: Tensor, weight_VH: Tensor, block: slice) -> None:
    """Carry a block's gradient in h W^T + b on to the hidden states, the weight and the bias."""
    if grads.hidden_TH is not None:
        grads.hidden_TH[block] = gradient_CV @ weight_VH
    if grads.weight_VH is not None and grads.weight_VH.dtype == gradient_CV.dtype:
        grads.weight_VH.addmm_(gradient_CV.T, hidden_CH)
    elif grads.weight_VH is not None:
        grads.weight_VH.add_(gradient_CV.T @ hidden_CH)
    if grads.bias_V is not None:
        grads.bias_V.add_(gradient_CV.sum(dim=0, dtype=grads.bias_V.dtype))
