"""A language-model head as a value: everything between the final hidden states and the logits, and
nothing else.

Shapes: T tokens, H hidden, V vocabulary. Gemma 2 soft-caps, Cohere multiplies, Granite divides, Phi
has a bias: a head that forgets one of them trains wrongly and says nothing, so teacher and student
both read theirs into this one type.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_WIDENED_ROWS = 1 << 14


@dataclass(frozen=True, slots=True)
class Head:
    """logits = softcap * tanh(a / softcap) with a = scale * (hidden @ weight^T + bias); without a
    softcap, logits = a.

    `weight_VH` and `bias_V` have exactly `vocab_size` rows: padded models are sliced before they
    come here.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    # whether narrower weights have their logits in float32, as the products are summed, or rounded
    # to themselves
    float32_logits: bool = False

    @property
    def vocab_size(self) -> int:
        return self.weight_VH.shape[0]

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, V] logits in the dtype of the weight, or in float32 where that is asked for and
        wider."""
        hidden_TH = hidden_TH.to(self.weight_VH.dtype)
        if self.float32_logits and self.weight_VH.dtype.itemsize < torch.float32.itemsize:
            logits_TV = _float32_product(hidden_TH, self.weight_VH)
            logits_TV = logits_TV if self.bias_V is None else logits_TV.add_(self.bias_V)
        else:
            logits_TV = torch.nn.functional.linear(hidden_TH, self.weight_VH, self.bias_V)
        if self.scale != 1.0:
            logits_TV = logits_TV * self.scale
        if self.softcap is not None:
            logits_TV = self.softcap * torch.tanh(logits_TV / self.softcap)
        return logits_TV


def _float32_product(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
    """hidden @ weight^T without a rounding at its end. Off the GPU, some rows of the weight are
    widened at a time."""
    if hidden_TH.device.type == "cuda":
        return torch.mm(hidden_TH, weight_VH.T, out_dtype=torch.float32)
    return torch.cat(
        [hidden_TH.float() @ rows_RH.float().T for rows_RH in weight_VH.split(_WIDENED_ROWS)], dim=1
    )
