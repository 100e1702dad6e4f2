"""A language-model head as a value: everything between the final hidden states and the logits, and nothing else.

Shapes: T tokens, H hidden, V vocabulary. Gemma 2 soft-caps, Cohere multiplies, Granite divides, Phi has a bias: a head that forgets
one of them trains wrongly and says nothing, so teacher and student both read theirs into this one type.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """logits = softcap * tanh(a / softcap) with a = scale * (hidden @ weight^T + bias); without a softcap, logits = a.

    `weight_VH` and `bias_V` have exactly `vocab_size` rows: padded models are sliced before they come here.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight_VH.shape[0]

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, V] logits in the dtype of the weight."""
        logits_TV = torch.nn.functional.linear(hidden_TH.to(self.weight_VH.dtype), self.weight_VH, self.bias_V)
        if self.scale != 1.0:
            logits_TV = logits_TV * self.scale
        if self.softcap is not None:
            logits_TV = self.softcap * torch.tanh(logits_TV / self.softcap)
        return logits_TV
