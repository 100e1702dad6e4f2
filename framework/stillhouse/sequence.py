"""Sequences of tokens as one value: a source makes it, a teacher scores it, a chunk stores it with
its targets, and a student trains on it.

Shapes: S sequences, L tokens in a sequence, T targets.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """S sequences of L tokens. The arrays may be read-only views of a memory map."""

    token_ids_SL: NDArray[np.int32]
    positions_SL: NDArray[np.int32]  # begin at 0 in each sequence, and again at each document in it
    loss_mask_SL: NDArray[np.uint8]  # 1 iff the distribution of the token after this is a target

    def __len__(self) -> int:
        return len(self.token_ids_SL)

    @property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
        return self.token_ids_SL, self.positions_SL, self.loss_mask_SL

    @property
    def num_targets(self) -> int:
        """Ones of the loss mask."""
        return int(self.loss_mask_SL.sum(dtype=np.int64))

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32 [T]: the token that follows each target position, in row-major order."""
        is_target_SL = self.loss_mask_SL != 0
        labels_T: NDArray[np.int32] = np.roll(self.token_ids_SL, -1, axis=1)[is_target_SL]
        return labels_T

    def select(self, rows: slice | NDArray[np.bool_] | NDArray[np.int64]) -> "Sequences":
        """Some of the sequences, in the order of `rows`; views where `rows` is a slice."""
        return Sequences(self.token_ids_SL[rows], self.positions_SL[rows], self.loss_mask_SL[rows])

    def without(self, rows: Collection[int]) -> "Sequences":
        """The same sequences with these set aside: each becomes a blank without targets, and all
        others keep their index."""
        ids_SL, positions_SL = self.token_ids_SL.copy(), self.positions_SL.copy()
        mask_SL = self.loss_mask_SL.copy()
        for row in rows:
            ids_SL[row], mask_SL[row] = 0, 0
            positions_SL[row] = np.arange(positions_SL.shape[1])
        return Sequences(ids_SL, positions_SL, mask_SL)


@dataclass(frozen=True, slots=True, eq=False)
class WorkItem:
    """A block of sequences for a teacher to score. Block `number`, scored, is chunk `number`."""

    number: int
    sequences: Sequences

    def only(self, row: int) -> "WorkItem":
        """The item with one of its sequences alone."""
        return replace(self, sequences=self.sequences.select(slice(row, row + 1)))

    def without(self, rows: Collection[int]) -> "WorkItem":
        """The item with these sequences set aside; the others keep their index, and so their
        draws."""
        return replace(self, sequences=self.sequences.without(rows))


def joined(parts: Sequence[Sequences]) -> Sequences:
    """The sequences of all parts, one part after another; a single part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    return Sequences(
        *(np.concatenate(arrays) for arrays in zip(*(part.arrays for part in parts), strict=True))
    )
