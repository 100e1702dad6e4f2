"""One chunk as bytes: a safetensors file in which the checksum or a row's hash covers every bit,
and no bit is used unchecked.

Shapes: S sequences (rows) of a chunk, L tokens of a sequence, N target tokens of all rows, B bytes
of a record, R rows asked for.

The checksum covers the index (header, row hashes and row starts: the first bytes of the file) and
the row hashes cover all the rest, so a reader of a few rows verifies all that it uses. A chunk is a
pure function of its values and its recipe: the same values, the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash

from stillhouse.errors import ChunkError
from stillhouse.sequence import Sequences
from stillhouse.store.chunk_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Buffer,
    blank_metadata,
    check_checksum,
    header_length,
    index_end,
    layout,
    parse_header,
    with_checksum,
)
from stillhouse.store.ranges import Extent
from stillhouse.store.recipe import Recipe
from stillhouse.store.stored_sequences import check_sequences


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """S sequences and the targets of their masked-in tokens, row after row."""

    number: int
    sequences: Sequences
    targets_NB: npt.NDArray[np.uint8]  # one record for each 1 of the mask

    @property
    def row_starts(self) -> npt.NDArray[np.int64]:
        """int64 [S + 1]: row s has the records row_starts[s] .. row_starts[s + 1]."""
        counts_S = self.sequences.loss_mask_SL.sum(axis=1, dtype=np.int64)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_S)])

    def row(self, row: int) -> "Chunk":
        """The chunk of this row alone, sharing its memory."""
        first, last = self.row_starts[row : row + 2]
        sequence = self.sequences.select(slice(row, row + 1))
        return Chunk(self.number, sequence, self.targets_NB[first:last])


@dataclass(frozen=True, slots=True, eq=False)
class ChunkIndex:
    """The verified first bytes of a chunk: where each row lies, and what it hashes to."""

    number: int
    row_starts: npt.NDArray[np.int64]
    row_xxh3_S: npt.NDArray[np.uint64]
    tensor_starts: dict[str, int]  # offsets in the file
    num_bytes: int
    recipe: Recipe

    def row_extents(self, row: int) -> list[Extent]:
        """The (start, end) in the file of the row's token ids, positions, loss mask and records:
        what its hash covers, in this order."""
        length, record_bytes = self.recipe.sequence_length, self.recipe.spec.bytes_per_token
        first, last = int(self.row_starts[row]), int(self.row_starts[row + 1])
        spans = {
            "token_ids": (row * length * 4, (row + 1) * length * 4),
            "positions": (row * length * 4, (row + 1) * length * 4),
            "loss_mask": (row * length, (row + 1) * length),
            "targets": (first * record_bytes, last * record_bytes),
        }
        starts = self.tensor_starts
        return [(starts[name] + start, starts[name] + end) for name, (start, end) in spans.items()]


def pack_chunk(chunk: Chunk, recipe: Recipe) -> bytes:
    """The file of a chunk. Raises ChunkError, as `unpack_chunk` does, on values that are not of the
    recipe."""
    tensors = _tensors_of(chunk, recipe)
    _check(chunk, recipe)
    data = safetensors.numpy.save(tensors, blank_metadata(recipe, chunk.number))
    return with_checksum(data, len(chunk.sequences))


def unpack_chunk(data: Buffer, recipe: Recipe, number: int) -> Chunk:
    """Read a whole chunk. Raises ChunkError naming the chunk unless every byte is what the recipe
    demands and what was published."""
    view = memoryview(data)
    index = parse_index(view[: index_bytes(recipe, number)], recipe, number, num_bytes=len(view))
    rows = range(len(index.row_xxh3_S))
    return unpack_rows(
        index, rows, [[view[start:end] for start, end in index.row_extents(row)] for row in rows]
    )


def index_bytes(recipe: Recipe, number: int) -> int:
    """As many first bytes of the file as hold the index, whatever the length of its header."""
    return index_end(MAX_HEADER_BYTES, len(recipe.chunk_rows(number)))


def parse_index(head: Buffer, recipe: Recipe, number: int, *, num_bytes: int) -> ChunkIndex:
    """Verify the index, found in the first `index_bytes` of a file of `num_bytes`. Raises
    ChunkError."""
    head, name, header_bytes = bytes(head), f"chunk {number}", header_length(head)
    # the header
    if len(head) < LENGTH_BYTES or header_bytes > min(MAX_HEADER_BYTES, num_bytes - LENGTH_BYTES):
        raise ChunkError(
            f"{name} claims a header of {header_bytes} bytes in a file of {num_bytes}; the most "
            f"is {MAX_HEADER_BYTES}"
        )
    data_start = LENGTH_BYTES + header_bytes
    tensors, checksum = parse_header(head[LENGTH_BYTES:data_start], recipe, number)
    # the lengths of the file and of what was read of it
    ends = [*accumulate((tensor.num_bytes for tensor in tensors), initial=data_start)]
    if ends[-1] != num_bytes:
        raise ChunkError(
            f"{name} has {num_bytes} bytes, wanted {ends[-1]}: it was cut short or added to"
        )
    if len(head) < ends[2]:
        raise ChunkError(
            f"of {name} {len(head)} bytes were read, wanted an index of {ends[2]}: the store's "
            "answer was cut short"
        )
    # the checksum, and what it covers
    check_checksum(checksum, head[: ends[2]], number)
    row_xxh3_S = np.frombuffer(head[ends[0] : ends[1]], "<u8")
    row_starts = np.frombuffer(head[ends[1] : ends[2]], "<i8")
    num_records, counts_S = tensors[-1].shape[0], np.diff(row_starts)
    spans_all = row_starts[0] == 0 and row_starts[-1] == num_records
    if not spans_all or counts_S.min() < 0 or counts_S.max() >= recipe.sequence_length:
        raise ChunkError(
            f"{name} has row_starts that do not divide its {num_records} records among "
            f"{len(counts_S)} rows"
        )
    starts = {tensor.name: start for tensor, start in zip(tensors, ends, strict=False)}
    return ChunkIndex(number, row_starts, row_xxh3_S, starts, num_bytes, recipe)


def unpack_rows(
    index: ChunkIndex, rows: Sequence[int], pieces_R4: Sequence[Sequence[Buffer]]
) -> Chunk:
    """The chunk of these rows alone, from the bytes of their `row_extents`. Raises ChunkError
    unless each hashes to what was published."""
    # every byte, by the hashes
    for row, pieces in zip(rows, pieces_R4, strict=True):
        found, wanted = _row_xxh3(pieces), int(index.row_xxh3_S[row])
        if found != wanted:
            raise ChunkError(
                f"chunk {index.number} is damaged: row {row} hashes to {found:016x}, "
                f"{wanted:016x} was published"
            )
    # the arrays
    length, record_bytes = index.recipe.sequence_length, index.recipe.spec.bytes_per_token
    columns = [bytearray().join(pieces[i] for pieces in pieces_R4) for i in range(4)]
    layouts = (("<i4", length), ("<i4", length), ("u1", length), ("u1", record_bytes))
    token_ids, positions, loss_mask, targets = (
        np.frombuffer(column, dtype).reshape(-1, width)
        for column, (dtype, width) in zip(columns, layouts, strict=True)
    )
    chunk = Chunk(index.number, Sequences(token_ids, positions, loss_mask), targets)
    # what they mean together
    counts_R = [int(index.row_starts[row + 1] - index.row_starts[row]) for row in rows]
    if chunk.sequences.loss_mask_SL.sum(axis=1, dtype=np.int64).tolist() != counts_R:
        raise ChunkError(
            f"chunk {index.number} has rows whose loss_mask and row_starts disagree on their "
            "number of targets"
        )
    _check(chunk, index.recipe)
    return chunk


def _tensors_of(chunk: Chunk, recipe: Recipe) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {
        "token_ids": chunk.sequences.token_ids_SL,
        "positions": chunk.sequences.positions_SL,
        "loss_mask": chunk.sequences.loss_mask_SL,
        "targets": chunk.targets_NB,
    }
    for tensor in layout(recipe, chunk.number, chunk.sequences.num_targets):
        array, wanted = arrays.get(tensor.name), (tensor.numpy_dtype, tensor.shape)
        if array is not None and (array.dtype, array.shape) != wanted:
            raise ChunkError(
                f"chunk {chunk.number} has {tensor.name} of {array.dtype} {list(array.shape)}, "
                f"wanted {tensor.numpy_dtype.name} {list(tensor.shape)}"
            )
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    ids, positions, mask, targets = arrays.values()
    rows = zip(ids, positions, mask, np.split(targets, chunk.row_starts[1:-1]), strict=True)
    hashes = [_row_xxh3([_bytes_of(array) for array in row]) for row in rows]
    return {**arrays, "row_starts": chunk.row_starts, "row_xxh3": np.array(hashes, np.uint64)}


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data)


def _row_xxh3(pieces: Sequence[Buffer]) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def _check(chunk: Chunk, recipe: Recipe) -> None:
    check_sequences(chunk.sequences, f"chunk {chunk.number}", vocab_size=recipe.vocab_size)
