"""Blocks of sequences as teachers meet them, with random tokens: packed documents, padded chat
rows, rows of one document, and short rows.

Shapes: S sequences of a block, L positions.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.random import Generator

from stillhouse.sequence import Sequences

PACKED, PADDED, WHOLE, SHORT = "packed documents", "padded chat rows", "one document", "short rows"
_SHORTEST = 4  # tokens of a document
_SHORT_ROW = 8  # times shorter than the other kinds' rows
_ANSWER = 0.4  # of a chat's tokens, those before its answer


def block_of(kind: str, shape: tuple[int, int], *, vocab_size: int, seed: int) -> Sequences:
    """A block [S, L] of this kind; short rows have an eighth of the positions."""
    random = np.random.default_rng([seed, list(_KINDS).index(kind)])
    num_rows, length = shape
    rows = [_KINDS[kind](length, random) for _ in range(num_rows)]
    positions_SL, mask_SL = (np.stack(column) for column in zip(*rows, strict=True))
    ids_SL = random.integers(0, vocab_size, positions_SL.shape)
    return Sequences(
        ids_SL.astype(np.int32), positions_SL.astype(np.int32), mask_SL.astype(np.uint8)
    )


_Row = tuple[np.ndarray, np.ndarray]  # positions [L] and loss mask [L]


def _packed(length: int, random: Generator) -> _Row:
    sizes = [*_sizes(length, random)]
    positions_L = np.concatenate([np.arange(size) for size in sizes])
    mask_L = np.append(positions_L[1:] > 0, False)
    return positions_L, mask_L


def _sizes(length: int, random: Generator) -> Iterator[int]:
    """Tokens of documents that fill a row; many are short, few are long."""
    while length:
        size = min(_mixed(length, random, typical=length / 4), length)
        yield size
        length -= size


def _padded(length: int, random: Generator) -> _Row:
    size = _mixed(length, random, typical=length / 3)
    places_L = np.arange(length)
    return places_L, (places_L >= int(_ANSWER * size)) & (places_L < size - 1)


def _whole(length: int, _random: Generator) -> _Row:
    places_L = np.arange(length)
    return places_L, places_L < length - 1


def _short(length: int, random: Generator) -> _Row:
    return _whole(max(length // _SHORT_ROW, _SHORTEST), random)


def _mixed(length: int, random: Generator, *, typical: float) -> int:
    return int(np.clip(random.lognormal(np.log(max(typical, 1.0)), 0.7), _SHORTEST, length))


_KINDS: dict[str, Callable[[int, Generator], _Row]] = {
    PACKED: _packed,
    PADDED: _padded,
    WHOLE: _whole,
    SHORT: _short,
}
KINDS: Sequence[str] = tuple(_KINDS)
