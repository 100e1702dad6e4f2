"""`Head`: a language-model head as a value, everything between last hidden states and logits.

Shapes: T tokens, H hidden, V vocabulary.

Gemma 2 soft-caps its logits, Cohere multiplies them, Granite divides them, Phi has a bias. A head
that leaves one of these out trains a wrong student without an error, so teachers and students both
use this one type.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

_WIDENED_ROWS = 1 << 14  # of the weight, converted to float32 at a time
_ROW_MULTIPLE = 64  # logits: rows of the buffer are a whole number of cache lines


class Curve(NamedTuple):
    """What a head does to its matrix products, elementwise: scale them, then cap them softly."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, products_TV: Tensor) -> Tensor:
        """In the products' dtype. The same tensor where there is nothing to do."""
        logits_TV = products_TV if self.scale == 1.0 else products_TV * self.scale
        if self.softcap is not None:
            logits_TV = self.softcap * torch.tanh(logits_TV / self.softcap)
        return logits_TV

    def float32_logits(self, products_TV: Tensor) -> Tensor:
        """As kernels compute them, without rounding to a narrower dtype, which would make ties. The
        same tensor where there is nothing to do."""
        return products_TV if self == AS_IT_IS else self.logits(products_TV.float())


AS_IT_IS = Curve()


@dataclass(frozen=True, slots=True)
class Head:
    """logits = softcap * tanh(a / softcap), or a without a softcap, where
    a = scale * (hidden @ weight^T + bias).

    `weight_VH` and `bias_V` have exactly `vocab_size` rows: a padded head is sliced before.

        head = Head(model.lm_head.weight[:vocab_size])
        logits_TV = head.logits(hidden_TH)
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    # For a weight narrower than float32: float32 logits, as matrix products are summed, rather than
    # logits rounded to the weight's dtype.
    float32_logits: bool = False

    @property
    def vocab_size(self) -> int:
        return self.weight_VH.shape[0]

    @property
    def curve(self) -> Curve:
        return Curve(self.scale, self.softcap)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, V] in the weight's dtype, or in float32 if `float32_logits` and that is
        wider."""
        return self.curve.logits(self.products(hidden_TH))

    def products(self, hidden_TH: Tensor, *, out_TV: Tensor | None = None) -> Tensor:
        """hidden @ weight^T + bias in the dtype of the logits: logits but for the curve.

        Written to `out_TV`, if given, which may be rows of `product_rows`.
        """
        hidden_TH = hidden_TH.to(self.weight_VH.dtype)
        if self._is_widened:
            products_TV = _float32_product(hidden_TH, self.weight_VH, out_TV=out_TV)
            return products_TV if self.bias_V is None else products_TV.add_(self.bias_V)
        if out_TV is None:
            return torch.nn.functional.linear(hidden_TH, self.weight_VH, self.bias_V)
        if self.bias_V is None:
            return torch.mm(hidden_TH, self.weight_VH.T, out=out_TV)
        return torch.addmm(self.bias_V, hidden_TH, self.weight_VH.T, out=out_TV)

    def product_rows(self, num_tokens: int) -> Tensor:
        """Room for `products` [T, V], in rows that are whole cache lines apart.

        Without them an odd vocabulary costs loads of 16 bytes and fast stores of a matrix product.
        What lies between two rows is never read as a logit, so it is not set.
        """
        width = -(-self.vocab_size // _ROW_MULTIPLE) * _ROW_MULTIPLE
        dtype = torch.float32 if self._is_widened else self.weight_VH.dtype
        rows_TW = self.weight_VH.new_empty((num_tokens, width), dtype=dtype)
        return rows_TW[:, : self.vocab_size]

    @property
    def _is_widened(self) -> bool:
        return self.float32_logits and self.weight_VH.dtype.itemsize < torch.float32.itemsize


def products_in_blocks(
    head: Head, hidden_TH: Tensor, *, block_tokens: int, num_buffers: int = 1
) -> tuple[Callable[[slice | Tensor], Tensor], Curve]:
    """The products of some rows of hidden states, by slice or by number, and the curve that is
    still to be applied to them.

    On a GPU all rows that are asked for, `block_tokens` at most, are in a buffer, which the call
    after `num_buffers` calls overwrites. Elsewhere they are logits, and nothing is left to do.
    """
    if hidden_TH.device.type != "cuda":
        return lambda rows: head.logits(hidden_TH[rows]), AS_IT_IS
    num_rows = min(block_tokens, len(hidden_TH))
    buffers = cycle([head.product_rows(num_rows) for _ in range(num_buffers)])

    def products_of(rows: slice | Tensor) -> Tensor:
        some_TH = hidden_TH[rows]
        return head.products(some_TH, out_TV=next(buffers)[: len(some_TH)])

    return products_of, head.curve


def _float32_product(hidden_TH: Tensor, weight_VH: Tensor, *, out_TV: Tensor | None) -> Tensor:
    """hidden @ weight^T in float32: one matrix product on a GPU, else some rows of the weight at a
    time, widened."""
    if hidden_TH.device.type == "cuda" and out_TV is not None:
        return torch.mm(hidden_TH, weight_VH.T, out_dtype=torch.float32, out=out_TV)
    if hidden_TH.device.type == "cuda":
        return torch.mm(hidden_TH, weight_VH.T, out_dtype=torch.float32)
    parts = [hidden_TH.float() @ rows_RH.float().T for rows_RH in weight_VH.split(_WIDENED_ROWS)]
    return torch.cat(parts, dim=1, out=out_TV)
