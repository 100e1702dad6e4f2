"""The tokens of one forward pass, and the hidden states at its target positions.

Shapes: B sequences, L positions, T target tokens, N tokens that a target depends on, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.models.attention import Documents, attends_by_document
from stillhouse.models.heads import final_hidden, hidden_of_documents
from stillhouse.sequence import Sequences


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """B sequences as tensors of int64; the T target tokens are in row-major order."""

    token_ids_BL: Tensor
    positions_BL: Tensor
    target_positions_T: Tensor  # indices into the flattened [B * L] tokens
    labels_T: Tensor  # the token that follows each target position
    needed: "Needed"

    @classmethod
    def of(cls, sequences: Sequences) -> Self:
        """The sequences as a batch on the CPU."""
        token_ids_BL = sequences.token_ids_SL.astype(np.int64)
        target_positions_T = np.flatnonzero(sequences.loss_mask_SL)
        return cls(
            torch.from_numpy(token_ids_BL),
            torch.from_numpy(sequences.positions_SL.astype(np.int64)),
            torch.from_numpy(target_positions_T),
            torch.from_numpy(sequences.labels.astype(np.int64)),
            Needed.of(sequences.positions_SL, target_positions_T),
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
            needed=self.needed.map(change),
        )


@dataclass(frozen=True, slots=True)
class Needed:
    """The tokens that a target depends on: those of each document up to its last target. The rest
    of a row, its padding with it, is not computed by a model that attends by document."""

    tokens_N: Tensor  # indices into the flattened [B * L] tokens
    targets_T: Tensor  # indices of the target positions into these N
    documents: Documents

    @classmethod
    def of(cls, positions_BL: NDArray[np.int32], target_positions_T: NDArray[np.int64]) -> Self:
        # where documents begin, and which one each token belongs to
        begins_BL = positions_BL == 0
        begins_BL[:, 0] = True
        begins_D = np.flatnonzero(begins_BL)
        document_of = begins_BL.ravel().cumsum() - 1

        # the last target of each; the one token of a batch without targets
        last_D = np.full(len(begins_D), -1)
        last_D[document_of[target_positions_T]] = target_positions_T
        if not len(target_positions_T):
            last_D[0] = 0
        tokens = np.arange(begins_BL.size)
        is_needed = tokens <= last_D[document_of]
        lengths = (last_D - begins_D + 1)[last_D >= 0]
        return cls(
            torch.from_numpy(np.flatnonzero(is_needed)),
            torch.from_numpy((is_needed.cumsum() - 1)[target_positions_T]),
            Documents.of(lengths),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(change(self.tokens_N), change(self.targets_T), self.documents.map(change))


def hidden_at(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[T, H]: the final hidden states at the target positions, on the model's device."""
    if attends_by_document(model):
        needed = batch.needed
        ids_N, positions_N = (
            of_all.flatten().index_select(0, needed.tokens_N)
            for of_all in (batch.token_ids_BL, batch.positions_BL)
        )
        hidden_NH = hidden_of_documents(model, ids_N, positions_N, needed.documents)
        return hidden_NH.index_select(0, needed.targets_T.to(hidden_NH.device))
    hidden_BLH = final_hidden(model, batch.token_ids_BL, batch.positions_BL)
    return hidden_BLH.flatten(0, 1).index_select(0, batch.target_positions_T.to(hidden_BLH.device))
