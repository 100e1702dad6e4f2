"""Sequences of tokens as one value: what a source yields, a teacher scores, a chunk stores and a
student reads.

Shapes: S sequences, L tokens in a sequence.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """S sequences of L tokens; the arrays may be read-only views of a memory map."""

    token_ids_SL: NDArray[np.int32]
    positions_SL: NDArray[np.int32]  # restart at 0 at each document and at each sequence
    loss_mask_SL: NDArray[np.uint8]  # 1 where the distribution after the token is a target

    def __len__(self) -> int:
        return len(self.token_ids_SL)

    @property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
        return self.token_ids_SL, self.positions_SL, self.loss_mask_SL

    @property
    def num_targets(self) -> int:
        return int(self.loss_mask_SL.sum(dtype=np.int64))

    def select(self, rows: slice | NDArray[np.bool_] | NDArray[np.int64]) -> "Sequences":
        """Some of them, sharing memory where `rows` is a slice."""
        return Sequences(self.token_ids_SL[rows], self.positions_SL[rows], self.loss_mask_SL[rows])

    def without(self, rows: Collection[int]) -> "Sequences":
        """These set aside: each a blank of the same length, without targets. The others keep their
        places."""
        token_ids_SL, positions_SL, loss_mask_SL = (
            self.token_ids_SL.copy(),
            self.positions_SL.copy(),
            self.loss_mask_SL.copy(),
        )
        for row in rows:
            token_ids_SL[row], loss_mask_SL[row] = 0, 0
            positions_SL[row] = np.arange(positions_SL.shape[1])
        return Sequences(token_ids_SL, positions_SL, loss_mask_SL)


@dataclass(frozen=True, slots=True, eq=False)
class WorkItem:
    """A block of sequences and its number: what a teacher is asked to score. Block `number`,
    scored, is chunk `number`."""

    number: int
    sequences: Sequences

    def only(self, row: int) -> "WorkItem":
        """One sequence, to be computed alone."""
        return replace(self, sequences=self.sequences.select(slice(row, row + 1)))

    def without(self, rows: Collection[int]) -> "WorkItem":
        """These sequences set aside; the others keep their places, and so their draws."""
        return replace(self, sequences=self.sequences.without(rows))


def joined(parts: Sequence[Sequences]) -> Sequences:
    """All of them, one after another."""
    if len(parts) == 1:
        return parts[0]
    return Sequences(
        *(np.concatenate(arrays) for arrays in zip(*(part.arrays for part in parts), strict=True))
    )
