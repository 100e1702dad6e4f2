"""The two passes over a block of logits in torch operations: the plain reference of the kernels in
`head_passes_triton`, and what the CPU runs.

    reduce_tail_   reads a block once: the sum of exp over each token's tail
    write_grad_    writes it once: each logit of the tail becomes its gradient

A pass takes products, h W^T + b, as they come out of the matmul. The head's scale and soft-cap turn
them into logits on the way. A trailing underscore means that the products are overwritten, as in
torch.

Shapes: C tokens of one block, K kept entries, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stillhouse.logits import Head


class TailStats(NamedTuple):
    """A softmax's statistics over the tail of each token: all logits but those of the kept ids."""

    peak_C1: Tensor  # the greatest logit, before temperature; finite even where every id is kept
    sum_C1: Tensor  # of exp((logit - peak) / temperature)
    ce_sum_C1: Tensor  # of exp(logit - peak); sum_C1 at temperature 1, or without `label_loss`


class TailGrad(NamedTuple):
    """The gradient of the loss in a logit of the tail, as numbers of the token:

    share * exp((logit - peak) / temperature) + ce_share * exp(logit - peak).
    """

    peak_C1: Tensor
    share_C1: Tensor
    ce_share_C1: Tensor  # not used at temperature 1, or without `label_loss`


class Passes(Protocol):
    """Both passes over one block after another, with buffers that every block uses.

    Made with the head, the most tokens of a block, the target's temperature, and `label_loss`:
    whether cross-entropy or the z-loss, which are at temperature 1, are part of the loss.
    """

    products_CV: Tensor  # buffer for the products, in the weight's dtype

    def reduce_tail_(self, products_CV: Tensor, ids_CK: Tensor) -> TailStats:
        """The statistics of the tail. Overwrites the products with what `write_grad_` needs."""

    def write_grad_(self, products_CV: Tensor, tail: TailGrad) -> Tensor:
        """[C, V]: the gradient of the loss in the products of the tail, in their place or in a
        buffer. Entries at kept ids have no meaning."""


def logits_and_slopes(head: Head, products_CX: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a few products, and d logit / d product at each."""
    logits_CX = products_CX * head.scale
    if head.softcap is None:
        return logits_CX, torch.full_like(logits_CX, head.scale)
    tanh_CX = torch.tanh(logits_CX / head.softcap)
    return tanh_CX * head.softcap, (1.0 - tanh_CX.square()) * head.scale


class TorchPasses:
    """`Passes` in torch operations, in float32 (float64 where the weight is)."""

    def __init__(self, head: Head, num_tokens: int, *, temperature: float, label_loss: bool):
        shape, weight_VH = (num_tokens, head.vocab_size), head.weight_VH
        dtype = torch.promote_types(weight_VH.dtype, torch.float32)

        def buffer(is_needed: bool) -> Tensor | None:
            return weight_VH.new_empty(shape, dtype=dtype) if is_needed else None

        self.products_CV = weight_VH.new_empty(shape)
        self._head, self._temperature = head, temperature
        self._wide_CV = buffer(weight_VH.dtype != dtype)
        self._slope_CV = buffer(head.softcap is not None)
        self._ce_CV = buffer(label_loss and temperature != 1.0)

    def reduce_tail_(self, products_CV: Tensor, ids_CK: Tensor) -> TailStats:
        # products to logits
        num_tokens, softcap = products_CV.shape[0], self._head.softcap
        logits_CV = self._in_wide_dtype(products_CV)
        if logits_CV is not products_CV:
            logits_CV.copy_(products_CV)
        if self._head.scale != 1.0:
            logits_CV.mul_(self._head.scale)
        if softcap is not None and self._slope_CV is not None:
            logits_CV.div_(softcap).tanh_()
            torch.mul(logits_CV, logits_CV, out=self._slope_CV[:num_tokens]).neg_().add_(1.0)
            logits_CV.mul_(softcap)
        # without the kept ones: not -inf, which would make NaN of an empty tail
        logits_CV.scatter_(1, ids_CK, torch.finfo(logits_CV.dtype).min)
        # logits to exp(logit - peak), at temperature 1 where that is needed too
        peak_C1 = logits_CV.amax(dim=1, keepdim=True)
        logits_CV.sub_(peak_C1)
        ce_sum_C1 = None
        if self._ce_CV is not None:
            ce_CV = torch.exp(logits_CV, out=self._ce_CV[:num_tokens])
            ce_sum_C1 = ce_CV.sum(dim=1, keepdim=True)
        if self._temperature != 1.0:
            logits_CV.div_(self._temperature)
        sum_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
        return TailStats(peak_C1, sum_C1, sum_C1 if ce_sum_C1 is None else ce_sum_C1)

    def write_grad_(self, products_CV: Tensor, tail: TailGrad) -> Tensor:
        num_tokens, scale = products_CV.shape[0], self._head.scale
        grad_CV = self._in_wide_dtype(products_CV).mul_(tail.share_C1 * scale)
        if self._ce_CV is not None:
            grad_CV.addcmul_(self._ce_CV[:num_tokens], tail.ce_share_C1 * scale)
        return grad_CV if self._slope_CV is None else grad_CV.mul_(self._slope_CV[:num_tokens])

    def _in_wide_dtype(self, products_CV: Tensor) -> Tensor:
        return products_CV if self._wide_CV is None else self._wide_CV[: len(products_CV)]
