"""The tokens of one forward pass, and the hidden states at its target positions.

Shapes: B sequences, L positions, T target tokens, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.models.heads import final_hidden
from stillhouse.sequence import Sequences


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """B sequences as tensors of int64; the T target tokens are in row-major order."""

    token_ids_BL: Tensor
    positions_BL: Tensor
    target_positions_T: Tensor  # indices into the flattened [B * L] tokens
    labels_T: Tensor  # the token that follows each target position

    @classmethod
    def of(cls, sequences: Sequences) -> Self:
        """The sequences as a batch on the CPU."""
        token_ids_BL = sequences.token_ids_SL.astype(np.int64)
        target_positions_T = np.flatnonzero(sequences.loss_mask_SL)
        return cls(
            torch.from_numpy(token_ids_BL),
            torch.from_numpy(sequences.positions_SL.astype(np.int64)),
            torch.from_numpy(target_positions_T),
            torch.from_numpy(np.roll(token_ids_BL, -1, axis=1).ravel()[target_positions_T]),
        )

    @property
    def num_targets(self) -> int:
        return self.labels_T.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same batch with `change` applied to each of its tensors."""
        return type(self)(
            token_ids_BL=change(self.token_ids_BL),
            positions_BL=change(self.positions_BL),
            target_positions_T=change(self.target_positions_T),
            labels_T=change(self.labels_T),
        )


def hidden_at(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[T, H]: the final hidden states at the target positions, on the model's device."""
    hidden_BLH = final_hidden(model, batch.token_ids_BL, batch.positions_BL)
    return hidden_BLH.flatten(0, 1).index_select(0, batch.target_positions_T.to(hidden_BLH.device))
