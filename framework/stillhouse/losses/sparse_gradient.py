"""The loss of a block of tokens and its gradient in the logits, from a few numbers of each token:
the logits at the ids that the loss names, and the softmax statistics of all others.

One sparse gradient serves every divergence. A function of the K kept log-masses and the tail's has
K gradients of its own in the kept logits, and ONE for all logits of the tail together, which the
softmax within the tail shares out. Autograd computes these K + 1 numbers on [C, K + 1] tensors, so
that a divergence is a few lines of torch. The label loss, which is cross-entropy to the label and
the z-loss, has a gradient of the same form.

Draws add the cross-entropy within the tail, p_tail times the mean over draws of
-log(q(draw) / q_tail), times the divergence's `forward_kl_share`. In expectation that is what
forward KL has beyond its buckets, up to the entropy of the teacher's tail, a constant (RS-KD, arXiv
2503.16870).

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


@dataclass(frozen=True, slots=True)
class Objective:
    """The weights of a loss, which sums over tokens

    divergence_weight * temperature^2 * D + ce_weight * CE + z_loss_weight * lse^2.

    D is the divergence of the buckets, and where the target has draws forward_kl_share times the
    cross-entropy within the tail. CE is the cross-entropy to the label and lse the log-sum-exp of
    the student's logits (z-loss: PaLM, arXiv 2204.02311, section 5), both at temperature 1.
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
) -> tuple[Tensor, LogitsGrad | None]:
    """Sums over C of (divergence, cross-entropy, lse^2), unweighted, and the gradient of their
    weighted total; None where it is not needed.

    A term without weight is not computed: its sum is 0. `target` is None without a divergence; then
    there are no kept ids, and the temperature is 1.
    """
    # each part of the loss, and its gradient in the K + 1 buckets
    sums_3 = logits.kept_CK.new_zeros(3)
    num_tokens, num_kept = logits.kept_CK.shape
    grad_CK1 = ce_grad_CK1 = logits.kept_CK.new_zeros((num_tokens, num_kept + 1))
    draw_mass_C1, temperature = grad_CK1[:, -1:], 1.0
    if target is not None:
        temperature = target.temperature
        sums_3[0], grad_CK1, draw_mass_C1 = _divergence_loss(
            logits, tail, target, objective=objective, needs_grad=needs_grad
        )
    if ids.label_CL.shape[1] or objective.z_loss_weight > 0.0:
        sums_3[1:], ce_grad_CK1 = _label_loss(ids, logits, tail, target, objective=objective)
    if not needs_grad:
        return sums_3, None

    # the tail's gradient as a share for each unit of exp(logit - peak)
    share_C1 = grad_CK1[:, -1:] / tail.sum_C1
    ce_share_C1 = ce_grad_CK1[:, -1:] / tail.ce_sum_C1
    if temperature == 1.0:
        share_C1, ce_share_C1 = share_C1 + ce_share_C1, torch.zeros_like(ce_share_C1)

    # draws and label: their part of the tail's gradient, and what comes off it
    others_CO = ids.others
    below_CO = (logits.others - tail.peak_C1).clamp(max=0.0)  # above 0 only for a kept label
    other_grad_CO = share_C1 * (below_CO / temperature).exp() + ce_share_C1 * below_CO.exp()
    other_grad_CO -= draw_mass_C1 * _count(ids.drawn_CN, others_CO)
    is_label_CO = _is_label(others_CO, ids.label_CL).to(other_grad_CO.dtype)
    other_grad_CO -= objective.ce_weight * is_label_CO
    kept_grad_CK = (grad_CK1 + ce_grad_CK1)[:, :-1]
    named_CX = torch.cat([kept_grad_CK, other_grad_CO], dim=1)
    return sums_3, LogitsGrad(named_CX, TailGrad(tail.peak_C1, share_C1, ce_share_C1))


def _divergence_loss(
    logits: AtNamedIds,
    tail: TailStats,
    target: CompressedLogits,
    *,
    objective: Objective,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence's sum over tokens; its weighted gradient in the kept logits and, summed, the
    tail's; and the part of that which each draw takes off."""
    # of the buckets
    temperature, share = target.temperature, objective.divergence.forward_kl_share
    student = _buckets(logits, tail.peak_C1, tail.sum_C1, target, temperature=temperature)
    logp_CK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], dim=1)
    logp_CK1 = logp_CK1.to(student.logq_CK1.dtype)
    sum_0, grad_logq_CK1 = _divergence_and_gradient(
        logp_CK1.clamp(min=LOG_FLOOR), student.logq_CK1, objective.divergence, needs_grad=needs_grad
    )
    # of the draws: cross-entropy within the tail
    mass_C1 = share * logp_CK1[:, -1:].exp() / max(1, target.num_draws)
    drawn_CN = (logits.drawn_CN - student.top_C1) / temperature
    sum_0 = sum_0 + (mass_C1 * (student.log_tail_C1 - drawn_CN)).sum()
    # from log q to logits: log-softmax backward
    grad_sum_C1 = grad_logq_CK1.sum(dim=1, keepdim=True)
    grad_logits_CK1 = grad_logq_CK1 - student.logq_CK1.exp() * grad_sum_C1
    grad_logits_CK1[:, -1:] += mass_C1 * target.num_draws
    # temperature^2, and the chain rule's 1 / temperature
    weight = objective.divergence_weight * temperature
    return sum_0, weight * grad_logits_CK1, weight * mass_C1


def _divergence_and_gradient(
    logp_CK1: Tensor, logq_CK1: Tensor, divergence: Divergence, *, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """The sum over tokens, and its gradient in log q by autograd (zeros where not needed)."""
    if not needs_grad:
        return divergence.of(logp_CK1, logq_CK1).sum(), torch.zeros_like(logq_CK1)
    with torch.enable_grad():
        leaf_CK1 = logq_CK1.detach().requires_grad_()
        sum_0 = divergence.of(logp_CK1, leaf_CK1).sum()
        (grad_logq_CK1,) = torch.autograd.grad(sum_0, leaf_CK1)
    return sum_0.detach(), grad_logq_CK1


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


def _count(ascending_CX: Tensor, wanted_CY: Tensor) -> Tensor:
    """How many times each wanted id is there."""
    end_CY = torch.searchsorted(ascending_CX, wanted_CY, right=True)
    return end_CY - torch.searchsorted(ascending_CX, wanted_CY)
