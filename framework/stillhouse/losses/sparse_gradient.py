"""The loss of a block of tokens, and its gradient, from few numbers of each: the logits that it
names, and what all the others sum to.

One gradient serves every divergence. A loss of the K kept entries and of the tail's mass changes
the K kept logits one by one, and all other logits of a token through ONE number, shared out by the
softmax within the tail. That number comes from autograd on [C, K + 1] tensors, so a divergence is a
few lines of torch. Cross-entropy and the z-loss have gradients of the same kind.

Draws from the teacher's tail add the cross-entropy within it: p_tail times the mean of -log(q(draw)
/ q_tail). In expectation, that is what forward KL over the whole vocabulary has beyond its buckets,
but for the entropy of the teacher's tail, which no student changes. A divergence adds it as many
times as it holds forward KL: its `forward_kl_share`.

Shapes: C tokens of one block, K kept entries, K1 = K + 1 buckets with the tail last, N draws, L = 1
label, or 0 where the text is not learnt, O = N + L ids that are named beside the kept ones, X = K +
O named ids.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.logits import CompressedLogits
from stillhouse.losses.divergences import LOG_FLOOR, Divergence
from stillhouse.losses.head_passes_torch import Shares, Tail


@dataclass(frozen=True, slots=True)
class Objective:
    """What is summed over tokens: divergence_weight * temperature^2 * D + ce_weight * CE +
    z_loss_weight * lse^2.

    D is the divergence of the buckets and, where the target has draws, forward_kl_share times the
    cross-entropy within the tail; CE is to the label, and lse the log-sum-exp of the student's
    logits (PaLM, arXiv 2204.02311, section 5), both at temperature 1.
    """

    divergence: Divergence
    divergence_weight: float
    ce_weight: float
    z_loss_weight: float


@dataclass(frozen=True, slots=True)
class Named:
    """Something for each id that a token's loss names: the id itself, the logit there, or the
    gradient."""

    kept_CK: Tensor
    drawn_CN: Tensor
    label_CL: Tensor

    @property
    def others(self) -> Tensor:
        """[C, O] of draws and label, where an id may be more than once; the label may be a kept
        one."""
        return torch.cat([self.drawn_CN, self.label_CL], dim=1)

    @property
    def every(self) -> Tensor:
        """[C, X] of kept, draws and label."""
        return torch.cat([self.kept_CK, self.drawn_CN, self.label_CL], dim=1)

    def split(self, values_CX: Tensor) -> "Named":
        """Such values for these ids, told apart."""
        return Named(
            *values_CX.split(
                [self.kept_CK.shape[1], self.drawn_CN.shape[1], self.label_CL.shape[1]], dim=1
            )
        )


def named_ids(
    target: CompressedLogits | None,
    labels_C: Tensor | None,
    *,
    num_tokens: int,
    device: torch.device,
) -> Named:
    """int64; the draws ascend."""
    none_C0 = torch.empty((num_tokens, 0), dtype=torch.int64, device=device)
    label_CL = none_C0 if labels_C is None else labels_C.long()[:, None]
    return (
        Named(none_C0, none_C0, label_CL)
        if target is None
        else Named(target.token_ids_TK.long(), target.tail_ids_TN.long(), label_CL)
    )


class Gradient(NamedTuple):
    """Of the weighted total in the logits, before temperature."""

    # kept, draws, label; in full, not on top of the tail's share; a label that is kept has no
    # meaning of its own
    named_CX: Tensor
    shares: Shares  # of all other logits


def loss_and_gradient(
    ids: Named,
    logits: Named,
    tail: Tail,
    target: CompressedLogits | None,
    *,
    objective: Objective,
    needed: bool,
) -> tuple[Tensor, Gradient | None]:
    """Sums over C of (divergence, cross-entropy, lse^2), and the gradient of their weighted total,
    where it is needed.

    What has no weight is not measured: its sum is 0. Without a target there are no kept ids, and
    the temperature is 1.
    """
    temperature = 1.0 if target is None else target.temperature
    sums_3 = logits.kept_CK.new_zeros(3)
    pull_CK1 = text_pull_CK1 = logits.kept_CK.new_zeros(
        (logits.kept_CK.shape[0], logits.kept_CK.shape[1] + 1)
    )
    drawn_mass_C1 = pull_CK1[:, -1:]
    if target is not None:
        sums_3[0], pull_CK1, drawn_mass_C1 = _from_teacher(
            logits, tail, target, objective=objective, needed=needed
        )
    if ids.label_CL.shape[1] or objective.z_loss_weight > 0.0:
        sums_3[1:], text_pull_CK1 = _from_text(ids, logits, tail, target, objective=objective)
    if not needed:
        return sums_3, None
    share_C1, text_share_C1 = (
        pull_CK1[:, -1:] / tail.sum_C1,
        text_pull_CK1[:, -1:] / tail.text_sum_C1,
    )
    if temperature == 1.0:
        share_C1, text_share_C1 = share_C1 + text_share_C1, torch.zeros_like(text_share_C1)
    below_CO = (logits.others - tail.peak_C1).clamp(max=0.0)  # above 0 only where the label is kept
    others_CO = share_C1 * (below_CO / temperature).exp() + text_share_C1 * below_CO.exp()
    others_CO -= drawn_mass_C1 * _count(ids.drawn_CN, ids.others)
    others_CO -= objective.ce_weight * _is_label(ids.others, ids.label_CL).to(others_CO.dtype)
    named_CX = torch.cat([(pull_CK1 + text_pull_CK1)[:, :-1], others_CO], dim=1)
    return sums_3, Gradient(named_CX, Shares(tail.peak_C1, share_C1, text_share_C1))


class _Student(NamedTuple):
    """The student's distribution at one temperature, in buckets. Sums are relative to `top`, so
    that large logits cost no digits."""

    logq_CK1: Tensor
    top_C1: Tensor  # the greatest logit, before temperature
    log_total_C1: Tensor  # logsumexp of all (logits - top) / temperature
    log_tail_C1: Tensor  # and of the tail's


def _student(
    logits: Named,
    peak_C1: Tensor,
    sum_C1: Tensor,
    target: CompressedLogits | None,
    *,
    temperature: float,
) -> _Student:
    logits_CK1 = torch.cat([logits.kept_CK, peak_C1], dim=1)
    top_C1 = logits_CK1.amax(dim=1, keepdim=True)
    logits_CK1 = (logits_CK1 - top_C1) / temperature
    logits_CK1[:, -1:] += sum_C1.log()
    log_total_C1 = logits_CK1.logsumexp(dim=1, keepdim=True)
    logq_CK1 = logits_CK1 - log_total_C1
    if target is not None and target.k == target.vocab_size:
        logq_CK1[:, -1] = LOG_FLOOR
    return _Student(logq_CK1, top_C1, log_total_C1, logits_CK1[:, -1:])


def _from_teacher(
    logits: Named, tail: Tail, target: CompressedLogits, *, objective: Objective, needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over tokens; its weighted gradient in the kept logits and, summed, in the tail's; and
    what each draw takes off that."""
    student = _student(logits, tail.peak_C1, tail.sum_C1, target, temperature=target.temperature)
    logp_CK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], dim=1).to(
        student.logq_CK1.dtype
    )
    sum_0, gradient_CK1 = _divergence(
        logp_CK1.clamp(min=LOG_FLOOR), student.logq_CK1, objective.divergence, needed=needed
    )
    mass_C1 = (
        objective.divergence.forward_kl_share * logp_CK1[:, -1:].exp() / max(1, target.num_draws)
    )
    sum_0 = (
        sum_0
        + (
            mass_C1
            * (student.log_tail_C1 - (logits.drawn_CN - student.top_C1) / target.temperature)
        ).sum()
    )
    pull_CK1 = gradient_CK1 - student.logq_CK1.exp() * gradient_CK1.sum(dim=1, keepdim=True)
    pull_CK1[:, -1:] += mass_C1 * target.num_draws
    # temperature^2, and the chain rule's 1 / temperature
    weight = objective.divergence_weight * target.temperature
    return sum_0, weight * pull_CK1, weight * mass_C1


def _divergence(
    logp_CK1: Tensor, logq_CK1: Tensor, divergence: Divergence, *, needed: bool
) -> tuple[Tensor, Tensor]:
    """The sum over tokens, and its gradient in log q (zeros where not needed)."""
    if not needed:
        return divergence.of(logp_CK1, logq_CK1).sum(), torch.zeros_like(logq_CK1)
    with torch.enable_grad():
        leaf_CK1 = logq_CK1.detach().requires_grad_()
        sum_0 = divergence.of(logp_CK1, leaf_CK1).sum()
        (gradient_CK1,) = torch.autograd.grad(sum_0, leaf_CK1)
    return sum_0.detach(), gradient_CK1


def _from_text(
    ids: Named, logits: Named, tail: Tail, target: CompressedLogits | None, *, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of (cross-entropy, lse^2); their weighted gradient in the kept logits and,
    but for the label's own, the tail's."""
    student = _student(logits, tail.peak_C1, tail.text_sum_C1, target, temperature=1.0)
    cross_entropy = (student.log_total_C1 - (logits.label_CL - student.top_C1)).sum()
    lse_C1 = student.top_C1 + student.log_total_C1
    squares = (
        lse_C1.square().sum() if objective.z_loss_weight > 0.0 else torch.zeros_like(cross_entropy)
    )
    weight_C1 = objective.ce_weight * ids.label_CL.shape[1] + 2.0 * objective.z_loss_weight * lse_C1
    pull_CK1 = weight_C1 * student.logq_CK1.exp()
    pull_CK1[:, :-1] -= objective.ce_weight * _is_label(ids.kept_CK, ids.label_CL).to(
        pull_CK1.dtype
    )
    return torch.stack([cross_entropy, squares]), pull_CK1


def _is_label(ids_CX: Tensor, label_CL: Tensor) -> Tensor:
    return (ids_CX[:, :, None] == label_CL[:, None, :]).any(dim=2)


def _count(ascending_CX: Tensor, wanted_CY: Tensor) -> Tensor:
    return torch.searchsorted(ascending_CX, wanted_CY, right=True) - torch.searchsorted(
        ascending_CX, wanted_CY
    )
