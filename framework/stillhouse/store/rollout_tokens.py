"""Pieces of rollouts: token ids and loss masks of a shard by byte ranges, so that who needs a few
of its rollouts does not read them all.

The checksum of a shard is of all its bytes, so pieces are unchecked: their reader has hashes of its
own.

Shapes: D tokens of a piece.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import ChunkError
from stillhouse.store.ranges import Extent
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import TokenPlaces, token_places


class Piece(NamedTuple):
    """Tokens that follow one another in a rollout: start <= t < stop."""

    row: int  # in its shard
    start: int
    stop: int


class PieceTokens(NamedTuple):
    """What was read of a piece."""

    ids_D: NDArray[np.int32]
    mask_D: NDArray[np.uint8]


class RolloutTokens:
    """Reads pieces of a store's rollouts. Thread-safe; it remembers where in a shard its tokens
    are."""

    def __init__(self, store: RolloutStore) -> None:
        self.store = store
        self._places: dict[int, TokenPlaces] = {}

    def read(self, number: int, pieces: Sequence[Piece]) -> list[PieceTokens]:
        """Of shard `number`, in the order of `pieces`: one request, and another before it when a
        shard is first read.

        Raises ChunkMissing where the shard is absent, ChunkError where it cannot hold the pieces.
        """
        places = self._places_in(number)
        extents: list[Extent] = []
        for piece in pieces:
            first = piece.row * places.length + piece.start
            last = first + piece.stop - piece.start
            extents.append((places.ids_at + 4 * first, places.ids_at + 4 * last))
            extents.append((places.mask_at + first, places.mask_at + last))
        found = self.store.read_extents(number, extents)
        for (start, end), data in zip(extents, found, strict=True):
            if len(data) != end - start:
                raise ChunkError(f"shard {number} ends before byte {end}: it is cut short")
        return [
            PieceTokens(np.frombuffer(ids, "<i4"), np.frombuffer(mask, "u1"))
            for ids, mask in zip(found[::2], found[1::2], strict=True)
        ]

    def _places_in(self, number: int) -> TokenPlaces:
        if number not in self._places:
            start, fingerprint = self.store.read_start(number), self.store.recipe.fingerprint
            self._places[number] = token_places(start, fingerprint, number)
        return self._places[number]
