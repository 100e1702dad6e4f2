"""The two passes over a block of logits in torch's own operations: the reference, and the way of
the CPU.

Shapes: C tokens of one block, K kept entries, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stillhouse.logits import Head


class Tail(NamedTuple):
    """What the logits outside the kept ids come to."""

    peak_C1: Tensor  # the greatest of them, before temperature; finite even where every id is kept
    sum_C1: Tensor  # of exp((logit - peak) / temperature)
    # of exp(logit - peak); the same tensor at temperature 1, or where nobody asks for it
    text_sum_C1: Tensor


class Shares(NamedTuple):
    """The gradient in a logit of the tail: share * exp((logit - peak) / temperature) + text_share *
    exp(logit - peak)."""

    peak_C1: Tensor
    share_C1: Tensor
    text_share_C1: Tensor  # without effect where the text is not asked for, or the temperature is 1


class Passes(Protocol):
    """Both passes over one block after another, each of at most as many tokens as there is room
    for."""

    products_CV: Tensor  # room for the products, in the weight's dtype

    def read_(self, products_CV: Tensor, ids_CK: Tensor) -> Tail:
        """Sum up the tail. The products are lost, or marked for `write_`."""

    def write_(self, products_CV: Tensor, shares: Shares) -> Tensor:
        """[C, V] gradient of the tail in the products, in the place of the products or of a buffer;
        anything at the kept ids."""


def capped(head: Head, products_CX: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a few products, and d logit / d product at each."""
    logits_CX = products_CX * head.scale
    if head.softcap is None:
        return logits_CX, torch.full_like(logits_CX, head.scale)
    bent_CX = torch.tanh(logits_CX / head.softcap)
    return bent_CX * head.softcap, (1.0 - bent_CX.square()) * head.scale


class TorchPasses:
    """In torch's own operations, in float32 (float64 where the weight is). Its buffers live as long
    as it does, and serve every block."""

    def __init__(self, head: Head, num_tokens: int, *, temperature: float, text: bool):
        weight_VH = head.weight_VH
        dtype = torch.promote_types(weight_VH.dtype, torch.float32)

        def buffer(wanted: bool) -> Tensor | None:
            return (
                weight_VH.new_empty((num_tokens, head.vocab_size), dtype=dtype) if wanted else None
            )

        self.products_CV = weight_VH.new_empty((num_tokens, head.vocab_size))
        self._head, self._temperature = head, temperature
        self._wide_CV = buffer(weight_VH.dtype != dtype)
        self._slope_CV = buffer(head.softcap is not None)
        self._text_CV = buffer(text and temperature != 1.0)

    def read_(self, products_CV: Tensor, ids_CK: Tensor) -> Tail:
        num_tokens = products_CV.shape[0]
        masses_CV = (
            products_CV if self._wide_CV is None else self._wide_CV[:num_tokens].copy_(products_CV)
        )
        if self._head.scale != 1.0:
            masses_CV.mul_(self._head.scale)
        if self._head.softcap is not None and self._slope_CV is not None:
            masses_CV.div_(self._head.softcap).tanh_()
            torch.mul(masses_CV, masses_CV, out=self._slope_CV[:num_tokens]).neg_().add_(1.0)
            masses_CV.mul_(self._head.softcap)
        # not -inf, which would make NaN of an empty tail
        masses_CV.scatter_(1, ids_CK, torch.finfo(masses_CV.dtype).min)
        peak_C1 = masses_CV.amax(dim=1, keepdim=True)
        masses_CV.sub_(peak_C1)
        text_sum_C1 = None
        if self._text_CV is not None:
            text_sum_C1 = torch.exp(masses_CV, out=self._text_CV[:num_tokens]).sum(
                dim=1, keepdim=True
            )
        if self._temperature != 1.0:
            masses_CV.div_(self._temperature)
        sum_C1 = masses_CV.exp_().sum(dim=1, keepdim=True)
        return Tail(peak_C1, sum_C1, sum_C1 if text_sum_C1 is None else text_sum_C1)

    def write_(self, products_CV: Tensor, shares: Shares) -> Tensor:
        num_tokens = products_CV.shape[0]
        gradient_CV = products_CV if self._wide_CV is None else self._wide_CV[:num_tokens]
        gradient_CV.mul_(shares.share_C1 * self._head.scale)
        if self._text_CV is not None:
            gradient_CV.addcmul_(
                self._text_CV[:num_tokens], shares.text_share_C1 * self._head.scale
            )
        return (
            gradient_CV if self._slope_CV is None else gradient_CV.mul_(self._slope_CV[:num_tokens])
        )
