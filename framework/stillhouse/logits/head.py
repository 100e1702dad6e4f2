"""`Head`: a language-model head as a value, everything between last hidden states and logits.

Shapes: T tokens, H hidden, V vocabulary.

Gemma 2 soft-caps its logits, Cohere multiplies them, Granite divides them, Phi has a bias. A head
that leaves one of these out trains a wrong student without an error, so teachers and students both
use this one type.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_WIDENED_ROWS = 1 << 14  # of the weight, converted to float32 at a time


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

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, V] in the weight's dtype, or in float32 if `float32_logits` and that is
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
    """hidden @ weight^T in float32: one matrix product on a GPU, else some rows of the weight at a
    time, widened."""
    if hidden_TH.device.type == "cuda":
        return torch.mm(hidden_TH, weight_VH.T, out_dtype=torch.float32)
    return torch.cat(
        [hidden_TH.float() @ rows_RH.float().T for rows_RH in weight_VH.split(_WIDENED_ROWS)], dim=1
    )
