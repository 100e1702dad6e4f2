"""Stored sequences: where the tokens of a block are in a store of rollouts. A teacher is sent this
instead of ids, and reads the tokens itself.

What is read is checked against the hashes of the sequences that the corpus was packed with, so it
is what was packed, or CorpusError is raised.

Shapes: S sequences of L tokens, P pieces of rollouts, laid end to end.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import NoReturn, TypeAlias

import numpy as np

from stillhouse.errors import ChunkError, CorpusError
from stillhouse.sequence import Sequences, WorkItem, joined
from stillhouse.sequences.corpus import hashes_of
from stillhouse.sequences.pieces import LocatedBlock, StoredSequences
from stillhouse.store import ChunkMissing
from stillhouse.store.rollout_store import RolloutsPlace, open_rollouts
from stillhouse.store.rollout_tokens import Piece, PieceTokens, RolloutTokens

_REQUESTS = 16  # at the same time


@dataclass(frozen=True, slots=True, eq=False)
class StoredItem:
    """A block of sequences for a teacher to score, some of which it reads from a store."""

    number: int
    block: LocatedBlock
    trial: int | None = None  # the one sequence that is wanted
    left_out: frozenset[int] = frozenset()  # sequences that are set aside

    def only(self, row: int) -> "StoredItem":
        """As `WorkItem.only`."""
        return replace(self, trial=row)

    def without(self, rows: Collection[int]) -> "StoredItem":
        """As `WorkItem.without`."""
        return replace(self, left_out=self.left_out | set(rows))


Work: TypeAlias = WorkItem | StoredItem  # what a teacher is sent


def _open_tokens(place: RolloutsPlace) -> RolloutTokens:
    return RolloutTokens(open_rollouts(*place))


class StoredReader:
    """Reads what stored sequences name. It remembers where in the shards tokens are, so a process
    has one."""

    def __init__(
        self, open_tokens: Callable[[RolloutsPlace], RolloutTokens] = _open_tokens
    ) -> None:
        self._tokens = cache(open_tokens)

    def work(self, item: Work) -> WorkItem:
        """The item with its sequences. Raises CorpusError where a store has others, or has them no
        more, and StoreUnavailable."""
        if isinstance(item, WorkItem):
            return item
        parts = [
            part if isinstance(part, Sequences) else self.read(part) for part in item.block.parts
        ]
        found = WorkItem(item.number, joined(parts).select(item.block.order_S))
        if item.left_out:
            found = found.without(item.left_out)
        return found if item.trial is None else found.only(item.trial)

    def read(self, stored: StoredSequences) -> Sequences:
        """The sequences. Raises as `work` does."""
        tokens = self._tokens(stored.place)
        try:
            found = _laid_out(stored, _gathered(stored, tokens.read))
            if _is_what_was_packed(found, stored):
                return found
            # perhaps damaged on the way alone: other requests, and each shard by its checksum
            found = _laid_out(stored, _gathered(stored, _Whole(tokens).read))
        except (ChunkMissing, ChunkError) as error:
            _refuse(stored, str(error), cause=error)
        if not _is_what_was_packed(found, stored):
            _refuse(stored, "some of its shards were written anew, with other tokens")
        return found


class _Whole:
    """Pieces as `RolloutTokens` reads them, out of whole shards that were verified."""

    def __init__(self, tokens: RolloutTokens) -> None:
        self._store = tokens.store

    def read(self, number: int, pieces: Sequence[Piece]) -> list[PieceTokens]:
        sequences = self._store.fetch(number).sequences
        return [
            PieceTokens(
                sequences.token_ids_SL[row, start:stop], sequences.loss_mask_SL[row, start:stop]
            )
            for row, start, stop in pieces
        ]


def _gathered(
    stored: StoredSequences, read: Callable[[int, Sequence[Piece]], list[PieceTokens]]
) -> list[PieceTokens]:
    """The tokens of each piece, with one read of each shard."""
    # which pieces each shard has
    numbers_of: Mapping[int, list[int]] = defaultdict(list)
    for number, shard in enumerate(stored.pieces_P4[:, 0].tolist()):
        numbers_of[shard].append(number)
    pieces = [Piece(*piece) for piece in stored.pieces_P4[:, 1:].tolist()]

    # their tokens, in the pieces' order
    found: dict[int, PieceTokens] = {}
    with ThreadPoolExecutor(_REQUESTS) as threads:
        answers = threads.map(
            lambda shard: read(shard, [pieces[number] for number in numbers_of[shard]]), numbers_of
        )
        for numbers, tokens in zip(numbers_of.values(), answers, strict=True):
            found.update(zip(numbers, tokens, strict=True))
    return [found[number] for number in range(len(pieces))]


def _laid_out(stored: StoredSequences, tokens: Sequence[PieceTokens]) -> Sequences:
    """Each sequence: its pieces one after the other, then padding, which continues the last."""
    shape = len(stored.ends_S), stored.length
    ids_SL = np.full(shape, stored.padding, np.int32)
    mask_SL = np.zeros(shape, np.uint8)
    positions_SL = np.tile(np.arange(stored.length, dtype=np.int32), (shape[0], 1))
    first = 0
    for row, end in enumerate(stored.ends_S.tolist()):
        at = 0
        for ids_D, mask_D in tokens[first:end]:
            after = at + len(ids_D)
            ids_SL[row, at:after] = ids_D
            mask_SL[row, at : after - 1] = mask_D[:-1]  # the next piece is not what follows
            positions_SL[row, at:] = np.arange(stored.length - at)
            at = after
        first = end
    return Sequences(ids_SL, positions_SL, mask_SL)


def _is_what_was_packed(found: Sequences, stored: StoredSequences) -> bool:
    return bool((hashes_of(found) == stored.hashes_S).all())


def _refuse(stored: StoredSequences, found: str, *, cause: BaseException | None = None) -> NoReturn:
    url, fingerprint16 = stored.place
    raise CorpusError(
        f"rollouts {fingerprint16} in {url} are not those that the corpus was packed from: "
        f"{found}. `stillhouse store verify {url}` tells what is damaged, and `stillhouse "
        "generate`, given again, writes what is missing"
    ) from cause
