"""The fused head: an LM head (matmul with the vocabulary) and a loss over its logits as one
differentiable operation, in blocks of tokens. Logits of T x V are never in memory.

    for each block of C tokens:
        products_CV = hidden_CH @ weight_VH.T + bias_V      # matmul, into one buffer
        tail = passes.reduce_tail_(products_CV, ids_CK)     # read once: softmax statistics
        loss, grad = loss_and_gradient(...)                 # on [C, K + 1] tensors
        grad_CV = passes.write_grad_(products_CV, grad)     # written once, in place
        grad_hidden_TH[block] = grad_CV @ weight_VH         # matmul
        grad_weight_VH += grad_CV.T @ hidden_CH             # matmul

So gradients are computed in the forward pass, as Liger does, and the backward pass scales them,
once: it hands them out without a copy. `loss_and_gradient` is in `sparse_gradient`; `reference` is
the same loss with all its logits in memory and autograd.

Shapes: T tokens, C tokens of one block, K kept entries, X ids that a loss names, V vocabulary, H
hidden.
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
from stillhouse.losses.head_passes_torch import Passes, logits_and_slopes
from stillhouse.losses.sparse_gradient import Measured, Objective, loss_and_gradient, named_ids


class Sums(NamedTuple):
    """Sums over tokens, 0-dimensional, in float32 (float64 where the weight is)."""

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    # no sums, but the largest of a weighted draw: log(q / p), and w q / p; 0 without them
    max_logratio: Tensor
    max_draw_mass: Tensor


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
    """The objective's sums over T. `total` is differentiable once, in the hidden states and the
    head's weight and bias; gradients that are not required are not computed.

    `target` None leaves the divergence out, `labels_T` None the cross-entropy. `block_tokens` None
    is chosen by the device; `make_passes` makes the passes over a block.

    Precision: matmuls run in the weight's dtype. All else, and the sum of the weight's gradient
    over blocks, is in float32, or in float64 where the weight is.

    Memory beside the gradients: [block_tokens, V] in the weight's dtype. `TorchPasses`, as on the
    CPU, adds the same in float32 for each of: a narrower weight, a soft-cap, and cross-entropy or
    the z-loss beside a target of another temperature than 1.

    Raises StudentError where its backward runs for a second time.
    """
    num_tokens = hidden_TH.shape[0]
    assert target is None or target.num_tokens == num_tokens, "one target for each hidden state"
    assert labels_T is None or labels_T.shape == (num_tokens,), "one label for each hidden state"
    block_tokens = block_tokens or block_tokens_for(hidden_TH.device, head.vocab_size)
    work = _Work(head, target, labels_T, objective, block_tokens, make_passes)
    grad_enabled = torch.is_grad_enabled()
    return Sums(*_HeadLoss.apply(hidden_TH, head.weight_VH, head.bias_V, work, grad_enabled))


@dataclass(frozen=True, slots=True)
class _Work:
    """What `head_loss` was called with, beside the tensors that autograd looks at."""

    head: Head
    target: CompressedLogits | None
    labels_T: Tensor | None
    objective: Objective
    block_tokens: int
    make_passes: Callable[..., Passes]

    @property
    def temperature(self) -> float:
        return 1.0 if self.target is None else self.target.temperature

    @property
    def has_label_loss(self) -> bool:
        return self.labels_T is not None or self.objective.z_loss_weight > 0.0


class _Gradients(NamedTuple):
    """The gradients of `total`, filled block by block; None for each that is not required."""

    hidden_TH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


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
        needs_hidden, needs_weight, needs_bias = (
            grad_enabled and needed for needed in ctx.needs_input_grad[:3]
        )
        # the first block overwrites the weight's
        empty_or_zeros_like = torch.empty_like if hidden_TH.shape[0] else torch.zeros_like
        ctx.gradients = _Gradients(
            torch.empty_like(hidden_TH) if needs_hidden else None,
            empty_or_zeros_like(weight_VH, dtype=dtype) if needs_weight else None,
            torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needs_bias else None,
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
        scaled = [
            None if gradient is None else _scaled_(gradient, grad_total, dtype=dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _scaled_(gradient: Tensor, factor: Tensor, *, dtype: torch.dtype) -> Tensor:
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _run_blocks(
    hidden_TH: Tensor, work: _Work, *, gradients: _Gradients, dtype: torch.dtype
) -> Sums:
    # blocks of one size: a last block of one token would cost a pass over the weight's gradient
    num_tokens, objective = hidden_TH.shape[0], work.objective
    num_blocks = max(1, -(-num_tokens // work.block_tokens))
    block_tokens = -(-num_tokens // num_blocks)
    passes = work.make_passes(
        work.head, block_tokens, temperature=work.temperature, label_loss=work.has_label_loss
    )
    # each adds to the sums and to the gradients
    sums_3 = torch.zeros(3, dtype=dtype, device=hidden_TH.device)
    extremes_2 = sums_3.new_zeros(2)
    for start in range(0, num_tokens, max(1, block_tokens)):
        block = slice(start, start + block_tokens)
        measured = _run_block(hidden_TH, work, block, passes, gradients=gradients)
        sums_3 += measured.sums_3
        extremes_2 = extremes_2.maximum(measured.extremes_2)
    # the weighted total
    divergence, cross_entropy, z_loss = (sums_3[i].clone() for i in range(3))
    total = objective.divergence_weight * work.temperature**2 * divergence
    total = total + objective.ce_weight * cross_entropy + objective.z_loss_weight * z_loss
    return Sums(
        total, divergence, cross_entropy, z_loss, extremes_2[0].clone(), extremes_2[1].clone()
    )


def _run_block(
    hidden_TH: Tensor, work: _Work, block: slice, passes: Passes, *, gradients: _Gradients
) -> Measured:
    """The terms of a block's loss. Writes its part of the gradients."""
    # the block's part of the inputs
    head = work.head
    hidden_CH = hidden_TH[block].to(head.weight_VH.dtype)
    target = None if work.target is None else work.target.map(itemgetter(block))
    labels_C = None if work.labels_T is None else work.labels_T[block]
    num_tokens, device = hidden_CH.shape[0], hidden_CH.device
    ids = named_ids(target, labels_C, num_tokens=num_tokens, device=device)
    # products, and what the loss needs of them
    products_CV = _multiply(hidden_CH, head, out=passes.products_CV[:num_tokens])
    dtype = torch.promote_types(products_CV.dtype, torch.float32)
    logits_CX, slopes_CX = logits_and_slopes(head, products_CV.gather(1, ids.every).to(dtype))
    tail = passes.reduce_tail_(products_CV, ids.kept_CK)
    # the loss, and its gradient in the logits
    measured, grad = loss_and_gradient(
        ids,
        ids.split(logits_CX),
        tail,
        target,
        objective=work.objective,
        needs_grad=any(each is not None for each in gradients),
    )
    # from logits to products, and on to the inputs
    if grad is not None:
        grad_CV = passes.write_grad_(products_CV, grad.tail)
        named = ids.split((grad.named_CX * slopes_CX).to(grad_CV.dtype))
        grad_CV.scatter_(1, ids.others, named.others).scatter_(1, ids.kept_CK, named.kept_CK)
        _backpropagate_(gradients, grad_CV, products_CV, hidden_CH, head.weight_VH, block=block)
    return measured


def _multiply(hidden_CH: Tensor, head: Head, *, out: Tensor) -> Tensor:
    if head.bias_V is None:
        return torch.mm(hidden_CH, head.weight_VH.T, out=out)
    return torch.addmm(head.bias_V, hidden_CH, head.weight_VH.T, out=out)


def _backpropagate_(
    gradients: _Gradients,
    grad_CV: Tensor,
    products_CV: Tensor,
    hidden_CH: Tensor,
    weight_VH: Tensor,
    *,
    block: slice,
) -> None:
    """From a block's products to the hidden states, the weight and the bias. The products may be
    overwritten."""
    # matmuls take the weight's dtype, but on the CPU the sum over tokens takes what is wider
    narrow_CV = grad_CV
    if grad_CV.dtype != weight_VH.dtype and (gradients.hidden_TH is not None or grad_CV.is_cuda):
        narrow_CV = products_CV.copy_(grad_CV)
    if gradients.hidden_TH is not None:
        gradients.hidden_TH[block] = narrow_CV @ weight_VH
    if gradients.weight_VH is not None:
        factor_CV = narrow_CV if grad_CV.is_cuda else grad_CV
        add_product_(gradients.weight_VH, factor_CV, hidden_CH, first=block.start == 0)
    if gradients.bias_V is not None:
        gradients.bias_V.add_(grad_CV.sum(dim=0, dtype=gradients.bias_V.dtype))


def add_product_(sum_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor, *, first: bool) -> None:
    """sum += grad^T hidden, or sum = grad^T hidden for the `first` one, accumulated in the sum's
    dtype.

    On CUDA, 16-bit operands are multiplied as they are. Elsewhere torch has no such matmul, so they
    are widened. Where the CPU multiplies bfloat16 faster, torch can be set to do that instead:
    `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`.
    """
    dtype = sum_VH.dtype
    if not grad_CV.is_cuda or grad_CV.dtype == dtype:
        sum_VH.addmm_(grad_CV.T.to(dtype), hidden_CH.to(dtype), beta=0.0 if first else 1.0)
    elif first:
        torch.mm(grad_CV.T, hidden_CH, out_dtype=dtype, out=sum_VH)
    elif _addmm_widens(grad_CV.device):
        torch.addmm(sum_VH, grad_CV.T, hidden_CH, out_dtype=dtype, out=sum_VH)
    else:
        sum_VH.add_(torch.mm(grad_CV.T, hidden_CH, out_dtype=dtype))


@cache
def _addmm_widens(device: torch.device) -> bool:
    """Whether addmm takes a float32 sum beside 16-bit operands, as it does from torch 2.10 on."""
    ones_22 = torch.ones((2, 2), dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(torch.zeros((2, 2), device=device), ones_22, ones_22, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True
