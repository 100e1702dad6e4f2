"""Pieces: which tokens of which rollouts the sequences of a corpus are made of, so that a teacher
can be sent this instead of ids.

Shapes: S sequences of L tokens, P pieces, laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stillhouse.sequence import Sequences
from stillhouse.sequences.ids import Tokens
from stillhouse.store.rollout_store import RolloutsPlace


@dataclass(frozen=True, slots=True, eq=False)
class StoredSequences:
    """S sequences of `length` tokens, by where their tokens are in a store of rollouts."""

    place: RolloutsPlace
    length: int
    padding: int  # the id that follows a sequence's last piece
    pieces_P4: NDArray[np.int32]  # of each: shard, rollout in it, first token, token after its last
    ends_S: NDArray[np.int64]  # pieces up to the end of each sequence
    hashes_S: NDArray[np.uint64]  # of the sequences, as `corpus.hashes_of` makes them


Located: TypeAlias = Sequences | StoredSequences


@dataclass(frozen=True, slots=True, eq=False)
class LocatedBlock:
    """A block of sequences as parts, laid end to end. Its sequence i is number `order_S[i]` of
    them."""

    parts: Sequence[Located]
    order_S: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class InStore:
    """Where the tokens of a corpus are in a store of rollouts, and the files that list its
    pieces."""

    place: RolloutsPlace
    padding: int
    pieces_path: str  # int32 [P, 4], as in StoredSequences
    ends_path: str  # int64 [S]: pieces up to the end of each sequence, in the order of its file


class PieceList:
    """The pieces of a corpus that is being packed. It stays empty where documents have no
    origin."""

    def __init__(self) -> None:
        self._pieces = [np.empty((0, 4), np.int32)]
        self._counts = [np.empty(0, np.int64)]

    def add(
        self, documents: Sequence[Tokens], starts_S: NDArray[np.int64], stops_S: NDArray[np.int64]
    ) -> None:
        """Add sequences: the tokens start <= t < stop of these documents, laid end to end."""
        if any(document.origin is None for document in documents):
            return
        # where pieces begin: with each document, and with each sequence
        ends = np.cumsum([len(document) for document in documents])
        firsts = ends - [len(document) for document in documents]
        origins = np.array([document.origin for document in documents], np.int64)
        for start, stop in zip(starts_S.tolist(), stops_S.tolist(), strict=True):
            used = slice(np.searchsorted(ends, start, "right"), np.searchsorted(firsts, stop))
            begin_P = np.maximum(firsts[used], start) - firsts[used] + origins[used, 2]
            end_P = np.minimum(ends[used], stop) - firsts[used] + origins[used, 2]
            pieces_P4 = np.column_stack([origins[used, :2], begin_P, end_P])
            self._pieces.append(pieces_P4.astype(np.int32))
            self._counts.append(np.array([len(pieces_P4)], np.int64))

    def written(self, beside: Path, place: RolloutsPlace, *, padding: int) -> InStore:
        """Write the lists to files beside a corpus's own."""
        pieces_path, ends_path = beside.with_suffix(".pieces.npy"), beside.with_suffix(".ends.npy")
        np.save(pieces_path, np.concatenate(self._pieces))
        np.save(ends_path, np.cumsum(np.concatenate(self._counts)))
        return InStore(place, padding, str(pieces_path), str(ends_path))
