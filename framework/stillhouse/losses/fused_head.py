"""An LM head and a loss over its logits as one differentiable operation, in token blocks: the T x V
logits never exist.

A block is multiplied out, read once and written once at full width (`head_passes`), with all else
on [C, K + 1] tensors in between (`sparse_gradient`), and multiplied into the gradients. So
gradients are made in the forward pass, and scaled in the backward, once: they are handed out, not
copied.

Shapes: T tokens, C tokens of one block, K kept entries, X ids that a loss names beside the kept
ones, V vocabulary, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillhouse.errors import StudentError
from stillhouse.logits import CompressedLogits, Head
from stillhouse.losses.head_passes import block_tokens_for, passes_for
from stillhouse.losses.head_passes_torch import Passes, capped
from stillhouse.losses.sparse_gradient import Objective, loss_and_gradient, named_ids


class Sums(NamedTuple):
    """Sums over tokens, each without dimensions, float32 (float64 where the weight is)."""

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor


def head_loss(
    hidden_TH: Tensor,
    head: Head,
    *,
    target: CompressedLogits | None,
    labels_T: Tensor | None,
    objective: Objective,
    block_tokens: int | None,
    make_passes: Callable[..., Passes] = passes_for,
) -> Sums:
    """The objective's sums over T; `total` is differentiable in the hidden states and in the head's
    weight and bias, once.

    `target` None leaves the divergence out, `labels_T` None the cross-entropy. Gradients that
    nobody needs are not computed. `block_tokens` None is chosen for the device, as the passes are
    that `make_passes` makes.

    The products with the weight run in its dtype; all else is in float32, or in float64 where the
    weight is, the sum of the weight's gradient over blocks included. Extra memory: [block_tokens,
    V] logits in the weight's dtype, and the gradients; on the CPU, and wherever torch takes the
    place of the kernels, the same again in float32 where the weight is narrower, once more under a
    softcap, and once more for cross-entropy or the z-loss beside a target of another temperature
    than 1.

    Its backward raises StudentError when it runs for a second time.
    """
    assert target is None or target.num_tokens == hidden_TH.shape[0], (
        "one target for each hidden state"
    )
    assert labels_T is None or labels_T.shape == hidden_TH.shape[:1], (
        "one label for each hidden state"
    )
    block_tokens = block_tokens or block_tokens_for(hidden_TH.device, head.vocab_size)
    work = _Work(head, target, labels_T, objective, block_tokens, make_passes)
    return Sums(
        *_HeadLoss.apply(hidden_TH, head.weight_VH, head.bias_V, work, torch.is_grad_enabled())
    )


@dataclass(frozen=True, slots=True)
class _Work:
    head: Head
    target: CompressedLogits | None
    labels_T: Tensor | None
    objective: Objective
    block_tokens: int
    make_passes: Callable[..., Passes]

    def rows(
        self, hidden_TH: Tensor, block: slice
    ) -> tuple[Tensor, CompressedLogits | None, Tensor | None]:
        """A block's hidden states in the weight's dtype, its target and its labels."""
        target = None if self.target is None else self.target.map(itemgetter(block))
        labels_C = None if self.labels_T is None else self.labels_T[block]
        return hidden_TH[block].to(self.head.weight_VH.dtype), target, labels_C

    @property
    def temperature(self) -> float:
        return 1.0 if self.target is None else self.target.temperature

    @property
    def reads_text(self) -> bool:
        return self.labels_T is not None or self.objective.z_loss_weight > 0.0


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        work: _Work,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        needed_hidden, needed_weight, needed_bias = (
            grad_enabled and needed for needed in ctx.needs_input_grad[:3]
        )
        # the first block overwrites what is there
        empty_or_zeros_like = torch.empty_like if hidden_TH.shape[0] else torch.zeros_like
        ctx.gradients = _Gradients(
            torch.empty_like(hidden_TH) if needed_hidden else None,
            empty_or_zeros_like(weight_VH, dtype=dtype) if needed_weight else None,
            torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needed_bias else None,
        )
        sums = _run_blocks(hidden_TH, work, gradients=ctx.gradients, dtype=dtype)
        ctx.dtypes = (hidden_TH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise StudentError(
                "the loss's gradients were handed out by its first backward; compute the loss "
                "again for a second one"
            )
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (
            *(
                None if gradient is None else _scaled_(gradient, grad_total, dtype=dtype)
                for gradient, dtype in pairs
            ),
            None,
            None,
        )


class _Gradients(NamedTuple):
    """Of `total`; None where nobody needs it. Filled in place, block by block."""

    hidden_TH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


def _scaled_(gradient: Tensor, factor: Tensor, *, dtype: torch.dtype) -> Tensor:
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _run_blocks(
    hidden_TH: Tensor, work: _Work, *, gradients: _Gradients, dtype: torch.dtype
) -> Sums:
    head, objective = work.head, work.objective
    num_blocks = max(1, -(-hidden_TH.shape[0] // work.block_tokens))
    # all alike: a last block of one token would cost a pass over the weight's gradient
    block_tokens = -(-hidden_TH.shape[0] // num_blocks)
    passes = work.make_passes(
        head, block_tokens, temperature=work.temperature, text=work.reads_text
    )
    sums_3 = torch.zeros(3, dtype=dtype, device=hidden_TH.device)
    for start in range(0, hidden_TH.shape[0], max(1, block_tokens)):
        block = slice(start, start + block_tokens)
        sums_3 += _run_block(hidden_TH, work, block, passes, gradients=gradients, dtype=dtype)
    divergence, cross_entropy, z_loss = (sums_3[i].clone() for i in range(3))
    total = objective.divergence_weight * work.temperature**2 * divergence
    return Sums(
        total + objective.ce_weight * cross_entropy + objective.z_loss_weight * z_loss,
        divergence,
        cross_entropy,
        z_loss,
    )


def _run_block(
    hidden_TH: Tensor,
    work: _Work,
    block: slice,
    passes: Passes,
    *,
    gradients: _Gradients,
    dtype: torch.dtype,
) -> Tensor:
    head, needed = work.head, any(gradient is not None for gradient in gradients)
    hidden_CH, target, labels_C = work.rows(hidden_TH, block)
    products_CV = _multiply(hidden_CH, head, out=passes.products_CV[: hidden_CH.shape[0]])
    ids = named_ids(target, labels_C, num_tokens=hidden_CH.shape[0], device=hidden_CH.device)
    logits_CX, slope_CX = capped(head, products_CV.gather(1, ids.every).to(dtype))
    tail = passes.read_(products_CV, ids.kept_CK)
    sums_3, gradient = loss_and_gradient(
        ids, ids.split(logits_CX), tail, target, objective=work.objective, needed=needed
    )
    if gradient is not None:
        gradient_CV = passes.write_(products_CV, gradient.shares)
        named = ids.split((gradient.named_CX * slope_CX).to(gradient_CV.dtype))
        gradient_CV.scatter_(1, ids.others, named.others).scatter_(1, ids.kept_CK, named.kept_CK)
        _add_to_(
            gradients,
            gradient_CV,
            products_CV,
            hidden_CH=hidden_CH,
            weight_VH=head.weight_VH,
            block=block,
        )
    return sums_3


def _multiply(hidden_CH: Tensor, head: Head, *, out: Tensor) -> Tensor:
    if head.bias_V is None:
        return torch.mm(hidden_CH, head.weight_VH.T, out=out)
    return torch.addmm(head.bias_V, hidden_CH, head.weight_VH.T, out=out)


def _add_to_(
    gradients: _Gradients,
    gradient_CV: Tensor,
    products_CV: Tensor,
    *,
    hidden_CH: Tensor,
    weight_VH: Tensor,
    block: slice,
) -> None:
    """Carry a block's gradient in its products on to the hidden states, the weight and the bias.
    The products are lost."""
    narrow_CV = gradient_CV
    if gradient_CV.dtype != weight_VH.dtype and (
        gradients.hidden_TH is not None or gradient_CV.is_cuda
    ):
        narrow_CV = products_CV.copy_(gradient_CV)
    if gradients.hidden_TH is not None:
        gradients.hidden_TH[block] = narrow_CV @ weight_VH
    if gradients.weight_VH is not None:
        add_product_(
            gradients.weight_VH,
            narrow_CV if gradient_CV.is_cuda else gradient_CV,
            hidden_CH,
            first=block.start == 0,
        )
    if gradients.bias_V is not None:
        gradients.bias_V.add_(gradient_CV.sum(dim=0, dtype=gradients.bias_V.dtype))


def add_product_(sum_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor, *, first: bool) -> None:
    """sum += gradient^T hidden, or = where it is the `first` one, without rounding the product to a
    narrower dtype than the sum's.

    On CUDA, narrower operands are multiplied as they are. Elsewhere torch has no such product, so
    they are widened; where the processor multiplies bfloat16 faster, torch may be told to do that
    instead: `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`.
    """
    if not gradient_CV.is_cuda or gradient_CV.dtype == sum_VH.dtype:
        sum_VH.addmm_(
            gradient_CV.T.to(sum_VH.dtype), hidden_CH.to(sum_VH.dtype), beta=0.0 if first else 1.0
        )
    elif first:
        torch.mm(gradient_CV.T, hidden_CH, out_dtype=sum_VH.dtype, out=sum_VH)
    elif _adds_to_float32(gradient_CV.device):
        torch.addmm(sum_VH, gradient_CV.T, hidden_CH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:
        sum_VH.add_(torch.mm(gradient_CV.T, hidden_CH, out_dtype=sum_VH.dtype))


@cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether addmm takes a float32 sum beside narrower operands; before torch 2.10 it wanted all
    of one dtype."""
    ones_22 = torch.ones((2, 2), dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(torch.zeros((2, 2), device=device), ones_22, ones_22, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True
