"""The loss of a block of tokens and its gradient in the logits, from a few numbers of each token:
the logits at the ids that the loss names, and the softmax statistics of all others.

One sparse gradient serves every divergence. A function of the K kept log-masses and the tail's has
K gradients of its own in the kept logits, and ONE for all logits of the tail together, which the
softmax within the tail shares out. Autograd computes these K + 1 numbers on [C, K + 1] tensors, so
that a divergence is a few lines of torch. The label loss, which is cross-entropy to the label and
the z-loss, has a gradient of the same form.

Draws have a gradient of their own in log(q(draw) / q_tail), on top of the tail's. Blind draws add
the cross-entropy within the tail, p_tail times the mean over draws of -log(q(draw) / q_tail), times
the divergence's `forward_kl_share`. In expectation that is what forward KL has beyond its buckets,
up to the entropy of the teacher's tail, a constant (RS-KD, arXiv 2503.16870), which comes off the
value where the target has it. Weighted draws add the rest of any divergence: `weighted_draws`.

Shapes: C tokens of one block, K kept entries, K1 = K + 1 buckets with the tail last, N draws, L = 1
label, or 0 without cross-entropy, O = N + L other named ids, X = K + O named ids.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.logits import CompressedLogits
from stillhouse.losses.divergences import LOG_FLOOR, Divergence
from stillhouse.losses.head_passes_torch import TailGrad, TailStats
from stillhouse.losses.weighted_draws import extremes, tail_rest


@dataclass(frozen=True, slots=True)
class Objective:
    """The weights of a loss, which sums over tokens

    divergence_weight * temperature^2 * D + ce_weight * CE + z_loss_weight * lse^2.

    D is the divergence of the buckets, and what the target's draws add to it: blind ones
    forward_kl_share times the cross-entropy within the tail, weighted ones `tail_rest`. CE is the
    cross-entropy to the label and lse the log-sum-exp of the student's logits (z-loss: PaLM, arXiv
    2204.02311, section 5), both at temperature 1.
    """

    divergence: Divergence
    divergence_weight: float
    ce_weight: float
    z_loss_weight: float


@dataclass(frozen=True, slots=True)
class AtNamedIds:
    """One value for each id that a token's loss names: the id, its logit, or a gradient there."""

    kept_CK: Tensor
    drawn_CN: Tensor
    label_CL: Tensor

    @property
    def others(self) -> Tensor:
        """[C, O]: draws and label. An id may be there twice, and the label may be a kept id."""
        return torch.cat([self.drawn_CN, self.label_CL], dim=1)

    @property
    def every(self) -> Tensor:
        """[C, X]: kept ids, draws and label."""
        return torch.cat([self.kept_CK, self.drawn_CN, self.label_CL], dim=1)

    def split(self, values_CX: Tensor) -> "AtNamedIds":
        """Values in the order of `every`, by kind of id."""
        sizes = [each.shape[1] for each in (self.kept_CK, self.drawn_CN, self.label_CL)]
        return AtNamedIds(*values_CX.split(sizes, dim=1))


def named_ids(
    target: CompressedLogits | None,
    labels_C: Tensor | None,
    *,
    num_tokens: int,
    device: torch.device,
) -> AtNamedIds:
    """The ids that the loss of each token names, int64; the draws ascend."""
    none_C0 = torch.empty((num_tokens, 0), dtype=torch.int64, device=device)
    label_CL = none_C0 if labels_C is None else labels_C.long()[:, None]
    if target is None:
        return AtNamedIds(none_C0, none_C0, label_CL)
    return AtNamedIds(target.token_ids_TK.long(), target.tail_ids_TN.long(), label_CL)


class Measured(NamedTuple):
    """What is told of a block's loss."""

    sums_3: Tensor  # over C: divergence, cross-entropy, lse^2; unweighted
    extremes_2: Tensor  # see `extremes`; 0 without weighted draws


class LogitsGrad(NamedTuple):
    """The gradient of the objective in the logits.

    At named ids it is the whole gradient, not what comes on top of the tail's. Where the label is a
    kept id, the kept one's counts.
    """

    named_CX: Tensor
    tail: TailGrad  # of all other logits


def loss_and_gradient(
    ids: AtNamedIds,
    logits: AtNamedIds,
    tail: TailStats,
    target: CompressedLogits | None,
    *,
    objective: Objective,
    needs_grad: bool,
) -> tuple[Measured, LogitsGrad | None]:
    """The terms of the loss, and the gradient of their weighted total; None where it is not needed.

    A term without weight is not computed: its sum is 0. `target` is None without a divergence; then
    there are no kept ids, and the temperature is 1.
    """
    # each part of the loss, and its gradient in the K + 1 buckets
    sums_3 = logits.kept_CK.new_zeros(3)
    num_tokens, num_kept = logits.kept_CK.shape
    grad_CK1 = ce_grad_CK1 = logits.kept_CK.new_zeros((num_tokens, num_kept + 1))
    drawn_grad_CN, extremes_2, temperature = logits.drawn_CN, sums_3.new_zeros(2), 1.0
    if target is not None:
        temperature = target.temperature
        sums_3[0], extremes_2, grad_CK1, drawn_grad_CN = _divergence_loss(
            logits, tail, target, objective=objective, needs_grad=needs_grad
        )
    measured = Measured(sums_3, extremes_2)
    if ids.label_CL.shape[1] or objective.z_loss_weight > 0.0:
        sums_3[1:], ce_grad_CK1 = _label_loss(ids, logits, tail, target, objective=objective)
    if not needs_grad:
        return measured, None

    # the tail's gradient as a share for each unit of exp(logit - peak)
    share_C1 = grad_CK1[:, -1:] / tail.sum_C1
    ce_share_C1 = ce_grad_CK1[:, -1:] / tail.ce_sum_C1
    if temperature == 1.0:
        share_C1, ce_share_C1 = share_C1 + ce_share_C1, torch.zeros_like(ce_share_C1)

    # draws and label: their part of the tail's gradient, and what comes on top of it
    others_CO = ids.others
    below_CO = (logits.others - tail.peak_C1).clamp(max=0.0)  # above 0 only for a kept label
    other_grad_CO = share_C1 * (below_CO / temperature).exp() + ce_share_C1 * below_CO.exp()
    other_grad_CO += _sum_by_id(drawn_grad_CN, ids.drawn_CN, others_CO)
    is_label_CO = _is_label(others_CO, ids.label_CL).to(other_grad_CO.dtype)
    other_grad_CO -= objective.ce_weight * is_label_CO
    kept_grad_CK = (grad_CK1 + ce_grad_CK1)[:, :-1]
    named_CX = torch.cat([kept_grad_CK, other_grad_CO], dim=1)
    return measured, LogitsGrad(named_CX, TailGrad(tail.peak_C1, share_C1, ce_share_C1))


def _divergence_loss(
    logits: AtNamedIds,
    tail: TailStats,
    target: CompressedLogits,
    *,
    objective: Objective,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The divergence's sum over tokens; the extremes of its weighted draws; its weighted gradient
    in the kept logits and, summed, the tail's; and what each draw has on top of its share."""
    # of the buckets and, where they have weights, the draws
    temperature, divergence = target.temperature, objective.divergence
    student = _buckets(logits, tail.peak_C1, tail.sum_C1, target, temperature=temperature)
    logp_CK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], dim=1)
    logp_CK1 = logp_CK1.to(student.logq_CK1.dtype)
    within_CN = (logits.drawn_CN - student.top_C1) / temperature - student.log_tail_C1
    sum_0, grad_logq_CK1, grad_within_CN = _divergence_and_gradient(
        logp_CK1.clamp(min=LOG_FLOOR),
        student.logq_CK1,
        within_CN,
        target,
        divergence=divergence,
        needs_grad=needs_grad,
    )
    # from log q to logits: log-softmax backward
    grad_sum_C1 = grad_logq_CK1.sum(dim=1, keepdim=True)
    grad_logits_CK1 = grad_logq_CK1 - student.logq_CK1.exp() * grad_sum_C1
    if target.draw_logprobs_TN is not None:
        extremes_2 = extremes(target, within_CN, student.logq_CK1[:, -1:])
        grad_logits_CK1[:, -1:] -= grad_within_CN.sum(dim=1, keepdim=True)
    else:
        # blind draws: cross-entropy within the tail, less the tail's entropy
        extremes_2 = sum_0.new_zeros(2)
        tail_mass_C1 = divergence.forward_kl_share * logp_CK1[:, -1:].exp()
        mass_C1 = tail_mass_C1 / max(1, target.num_draws)
        sum_0 = sum_0 - (mass_C1 * within_CN).sum()
        if target.num_draws and target.tail_entropy_T is not None:
            sum_0 = sum_0 - (tail_mass_C1[:, 0] * target.tail_entropy_T).sum()
        grad_logits_CK1[:, -1:] += mass_C1 * target.num_draws
        grad_within_CN = (-mass_C1).expand_as(within_CN)
    # temperature^2, and the chain rule's 1 / temperature
    weight = objective.divergence_weight * temperature
    return sum_0, extremes_2, weight * grad_logits_CK1, weight * grad_within_CN


def _divergence_and_gradient(
    logp_CK1: Tensor,
    logq_CK1: Tensor,
    within_CN: Tensor,
    target: CompressedLogits,
    *,
    divergence: Divergence,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over tokens, of the buckets and the weighted draws. Its gradients by autograd (zeros
    where not needed): in log q, and in log(q / q_tail) of each draw."""

    def total(logq_CK1: Tensor, within_CN: Tensor) -> Tensor:
        sum_0 = divergence.of(logp_CK1, logq_CK1).sum()
        generator = divergence.tail_generator
        if target.draw_logprobs_TN is None or generator is None:
            return sum_0
        return sum_0 + tail_rest(target, within_CN, logq_CK1[:, -1:], generator=generator).sum()

    if not needs_grad:
        zeros = torch.zeros_like(logq_CK1), torch.zeros_like(within_CN)
        return total(logq_CK1, within_CN), *zeros
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in (logq_CK1, within_CN)]
        sum_0 = total(*leaves)
        of_logq_CK1, of_within_CN = torch.autograd.grad(sum_0, leaves, materialize_grads=True)
    return sum_0.detach(), of_logq_CK1, of_within_CN


def _label_loss(
    ids: AtNamedIds,
    logits: AtNamedIds,
    tail: TailStats,
    target: CompressedLogits | None,
    *,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of (cross-entropy, lse^2); their weighted gradient in the kept logits and,
    summed, the tail's, the label's own -ce_weight left out where it is in the tail."""
    student = _buckets(logits, tail.peak_C1, tail.ce_sum_C1, target, temperature=1.0)
    cross_entropy = (student.log_total_C1 - (logits.label_CL - student.top_C1)).sum()
    lse_C1 = student.top_C1 + student.log_total_C1
    has_z_loss = objective.z_loss_weight > 0.0
    z_loss = lse_C1.square().sum() if has_z_loss else torch.zeros_like(cross_entropy)
    weight_C1 = objective.ce_weight * ids.label_CL.shape[1] + 2.0 * objective.z_loss_weight * lse_C1
    grad_CK1 = weight_C1 * student.logq_CK1.exp()
    is_label_CK = _is_label(ids.kept_CK, ids.label_CL).to(grad_CK1.dtype)
    grad_CK1[:, :-1] -= objective.ce_weight * is_label_CK
    return torch.stack([cross_entropy, z_loss]), grad_CK1


class _Buckets(NamedTuple):
    """The student's distribution over the buckets at one temperature. Its sums are of
    exp((logit - top) / temperature), so that large logits cost no digits."""

    logq_CK1: Tensor
    top_C1: Tensor  # the greatest logit, before temperature
    log_total_C1: Tensor  # log of the sum over the vocabulary
    log_tail_C1: Tensor  # and over the tail


def _buckets(
    logits: AtNamedIds,
    peak_C1: Tensor,
    tail_sum_C1: Tensor,
    target: CompressedLogits | None,
    *,
    temperature: float,
) -> _Buckets:
    logits_CK1 = torch.cat([logits.kept_CK, peak_C1], dim=1)
    top_C1 = logits_CK1.amax(dim=1, keepdim=True)
    logits_CK1 = (logits_CK1 - top_C1) / temperature
    logits_CK1[:, -1:] += tail_sum_C1.log()
    log_total_C1 = logits_CK1.logsumexp(dim=1, keepdim=True)
    logq_CK1 = logits_CK1 - log_total_C1
    if target is not None and target.k == target.vocab_size:  # the tail is empty
        logq_CK1[:, -1] = LOG_FLOOR
    return _Buckets(logq_CK1, top_C1, log_total_C1, logits_CK1[:, -1:])


def _is_label(ids_CX: Tensor, label_CL: Tensor) -> Tensor:
    return (ids_CX[:, :, None] == label_CL[:, None, :]).any(dim=2)


def _sum_by_id(values_CN: Tensor, ascending_CN: Tensor, wanted_CO: Tensor) -> Tensor:
    """The sum of the values of all draws of each wanted id."""
    up_to_CN1 = torch.nn.functional.pad(values_CN.double().cumsum(dim=1), (1, 0))
    end_CO = torch.searchsorted(ascending_CN, wanted_CO, right=True)
    start_CO = torch.searchsorted(ascending_CN, wanted_CO)
    return (up_to_CN1.gather(1, end_CO) - up_to_CN1.gather(1, start_CO)).to(values_CN.dtype)
