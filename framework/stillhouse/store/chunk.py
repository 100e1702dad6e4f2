"""One chunk as bytes: a safetensors file in which the checksum or a row's hash covers every bit,
and no bit is used unchecked.

Shapes: S sequences (rows) of a chunk, L tokens of a sequence, N target tokens of all rows, B bytes
of a record, R rows asked for.

The checksum covers the index (header, row hashes and row starts: the first bytes of the file) and
the row hashes cover all the rest, so a reader of a few rows verifies all that it uses. A chunk is a
pure function of its values and its recipe: the same values, the same bytes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash

from stillhouse.errors import ChunkError
from stillhouse.logits.record import CODEC_VERSION
from stillhouse.sequence import Sequences
from stillhouse.store.recipe import FORMAT_VERSION, Recipe, canonical_json

MAX_HEADER_BYTES = 8192

_LENGTH_BYTES = 8
START_BYTES = _LENGTH_BYTES + MAX_HEADER_BYTES  # in which every header ends
# as it stands in the header, where the metadata is a JSON text inside a JSON text
_CHECKSUM_FIELD = b'\\"xxh3\\":\\"'
_CHECKSUM_DIGITS = 16
_DTYPES: dict[str, np.dtype[Any]] = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}

Buffer = bytes | memoryview
Extent = tuple[int, int]


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
        return Chunk(
            self.number, self.sequences.select(slice(row, row + 1)), self.targets_NB[first:last]
        )


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
        return [
            (self.tensor_starts[name] + start, self.tensor_starts[name] + end)
            for name, (start, end) in spans.items()
        ]


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def pack_chunk(chunk: Chunk, recipe: Recipe) -> bytes:
    """The file of a chunk. Raises ChunkError, as `unpack_chunk` does, on values that are not of the
    recipe."""
    tensors = _tensors_of(chunk, recipe)
    _check_rows(chunk, recipe)
    blank = {**_metadata(recipe, chunk.number), "xxh3": "0" * _CHECKSUM_DIGITS}
    data = safetensors.numpy.save(tensors, {"stillhouse": canonical_json(blank).decode("ascii")})
    index_end = _index_end(int.from_bytes(data[:_LENGTH_BYTES], "little"), len(chunk.sequences))
    start = data.index(_CHECKSUM_FIELD) + len(_CHECKSUM_FIELD)
    checksum = xxhash.xxh3_64_hexdigest(data[:index_end]).encode("ascii")
    return b"".join([data[:start], checksum, memoryview(data)[start + _CHECKSUM_DIGITS :]])


def checksum_of(data: bytes) -> str:
    """The checksum that a packed chunk carries: 16 hexadecimal digits."""
    start = data.index(_CHECKSUM_FIELD) + len(_CHECKSUM_FIELD)
    return data[start : start + _CHECKSUM_DIGITS].decode("ascii")


def unpack_chunk(data: Buffer, recipe: Recipe, number: int) -> Chunk:
    """Read a whole chunk. Raises ChunkError naming the chunk unless every byte is what the recipe
    demands and what was published."""
    view = memoryview(data)
    index = parse_index(view[: index_bytes(recipe, number)], recipe, number, num_bytes=len(view))
    rows = range(len(index.row_xxh3_S))
    return unpack_rows(
        index, rows, [[view[start:end] for start, end in index.row_extents(row)] for row in rows]
    )


def is_whole(start: Buffer, *, num_bytes: int) -> bool:
    """Whether a file of `num_bytes` is as long as its first `START_BYTES` say. It finds what was
    cut short, cheaply; not all damage."""
    header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(bytes(start[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes]))
        return bool(
            num_bytes == _LENGTH_BYTES + header_bytes + header["targets"]["data_offsets"][1]
        )
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def index_bytes(recipe: Recipe, number: int) -> int:
    """As many first bytes of the file as hold the index, whatever the length of its header."""
    return _index_end(MAX_HEADER_BYTES, len(recipe.chunk_rows(number)))


def parse_index(head: Buffer, recipe: Recipe, number: int, *, num_bytes: int) -> ChunkIndex:
    """Verify the index, found in the first `index_bytes` of a file of `num_bytes`. Raises
    ChunkError."""
    head, name, num_rows = bytes(head), _name(number), len(recipe.chunk_rows(number))
    header_bytes = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if len(head) < _LENGTH_BYTES or header_bytes > min(MAX_HEADER_BYTES, num_bytes - _LENGTH_BYTES):
        raise ChunkError(
            f"{name} claims a header of {header_bytes} bytes in a file of {num_bytes}; the most "
            f"is {MAX_HEADER_BYTES}"
        )
    header = _parse_object(
        head[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes], f"the header of {name}"
    )
    tensors, checksum = _check_header(header, recipe, number)
    ends = list(
        accumulate((tensor.num_bytes for tensor in tensors), initial=_LENGTH_BYTES + header_bytes)
    )
    if ends[-1] != num_bytes:
        raise ChunkError(
            f"{name} has {num_bytes} bytes, wanted {ends[-1]}: it was cut short or added to"
        )
    if len(head) < ends[2]:
        raise ChunkError(
            f"of {name} {len(head)} bytes were read, wanted an index of {ends[2]}: the store's "
            "answer was cut short"
        )
    _check_checksum(checksum, head[: ends[2]], header_bytes, name)
    row_xxh3_S, row_starts = (
        np.frombuffer(head[ends[0] : ends[1]], "<u8"),
        np.frombuffer(head[ends[1] : ends[2]], "<i8"),
    )
    counts_S = np.diff(row_starts)
    if (
        row_starts[0] != 0
        or row_starts[-1] != tensors[-1].shape[0]
        or counts_S.min() < 0
        or counts_S.max() >= recipe.sequence_length
    ):
        raise ChunkError(
            f"{name} has row_starts that do not divide its {tensors[-1].shape[0]} records among "
            f"{num_rows} rows"
        )
    starts = {tensor.name: start for tensor, start in zip(tensors, ends, strict=False)}
    return ChunkIndex(number, row_starts, row_xxh3_S, starts, num_bytes, recipe)


def unpack_rows(
    index: ChunkIndex, rows: Sequence[int], pieces_R4: Sequence[Sequence[Buffer]]
) -> Chunk:
    """The chunk of these rows alone, from the bytes of their `row_extents`. Raises ChunkError
    unless each hashes to what was published."""
    for row, pieces in zip(rows, pieces_R4, strict=True):
        found, wanted = _row_xxh3(pieces), int(index.row_xxh3_S[row])
        if found != wanted:
            raise ChunkError(
                f"{_name(index.number)} is damaged: row {row} hashes to {found:016x}, "
                f"{wanted:016x} was published"
            )
    length, record_bytes = index.recipe.sequence_length, index.recipe.spec.bytes_per_token
    columns = [bytearray().join(pieces[i] for pieces in pieces_R4) for i in range(4)]
    token_ids, positions, loss_mask, targets = (
        np.frombuffer(column, dtype).reshape(-1, width)
        for column, dtype, width in zip(
            columns, ("<i4", "<i4", "u1", "u1"), (length, length, length, record_bytes), strict=True
        )
    )
    chunk = Chunk(index.number, Sequences(token_ids, positions, loss_mask), targets)
    counts_R = [int(index.row_starts[row + 1] - index.row_starts[row]) for row in rows]
    if chunk.sequences.loss_mask_SL.sum(axis=1, dtype=np.int64).tolist() != counts_R:
        raise ChunkError(
            f"{_name(index.number)} has rows whose loss_mask and row_starts disagree on their "
            "number of targets"
        )
    _check_rows(chunk, index.recipe)
    return chunk


def _layout(recipe: Recipe, number: int, num_targets: int) -> list[_Tensor]:
    """The tensors in the order of their bytes."""
    rows, length = len(recipe.chunk_rows(number)), recipe.sequence_length
    return [
        _Tensor("row_xxh3", "U64", (rows,)),
        _Tensor("row_starts", "I64", (rows + 1,)),
        _Tensor("positions", "I32", (rows, length)),
        _Tensor("token_ids", "I32", (rows, length)),
        _Tensor("loss_mask", "U8", (rows, length)),
        _Tensor("targets", "U8", (num_targets, recipe.spec.bytes_per_token)),
    ]


def _metadata(recipe: Recipe, number: int) -> dict[str, Any]:
    return {
        "chunk": number,
        "codec": recipe.spec.codec_name,
        "codec_version": CODEC_VERSION,
        "fingerprint": recipe.fingerprint,
        "format": FORMAT_VERSION,
        "k": recipe.k,
        "num_draws": recipe.num_draws,
        "temperature": float(recipe.temperature),
        "value_bits": recipe.value_bits,
        "vocab_size": recipe.vocab_size,
    }


def _tensors_of(chunk: Chunk, recipe: Recipe) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {
        "token_ids": chunk.sequences.token_ids_SL,
        "positions": chunk.sequences.positions_SL,
        "loss_mask": chunk.sequences.loss_mask_SL,
        "targets": chunk.targets_NB,
    }
    num_targets = chunk.sequences.num_targets
    for tensor in _layout(recipe, chunk.number, num_targets):
        array = arrays.get(tensor.name)
        if array is not None and (array.dtype, array.shape) != (
            _DTYPES[tensor.dtype],
            tensor.shape,
        ):
            wanted = f"{_DTYPES[tensor.dtype].name} {list(tensor.shape)}"
            raise ChunkError(
                f"{_name(chunk.number)} has {tensor.name} of {array.dtype} {list(array.shape)}, "
                f"wanted {wanted}"
            )
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    starts = chunk.row_starts
    rows = zip(
        arrays["token_ids"],
        arrays["positions"],
        arrays["loss_mask"],
        np.split(arrays["targets"], starts[1:-1]),
        strict=True,
    )
    hashes = [_row_xxh3([_bytes_of(array) for array in row]) for row in rows]
    return {**arrays, "row_starts": starts, "row_xxh3": np.array(hashes, np.uint64)}


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data)


def _row_xxh3(pieces: Sequence[Buffer]) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def _index_end(header_bytes: int, num_rows: int) -> int:
    return _LENGTH_BYTES + header_bytes + 8 * num_rows + 8 * (num_rows + 1)


def _name(number: int) -> str:
    return f"chunk {number}"


def _parse_object(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ChunkError(f"{what} is damaged: it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ChunkError(
            f"{what} is damaged: it is a JSON {type(value).__name__}, wanted an object"
        )
    return value


def _check_header(header: dict[str, Any], recipe: Recipe, number: int) -> tuple[list[_Tensor], Any]:
    """The tensors in the order of their bytes, and the checksum as it is claimed. All else in the
    header is verified."""
    name = _name(number)
    match header.get("__metadata__"):
        case {"stillhouse": str(text), **others} if not others:
            metadata = _parse_object(text.encode("utf-8", "replace"), f"the metadata of {name}")
            _check_metadata(metadata, recipe, number)
        case found:
            raise ChunkError(
                f"{name} has the metadata {found!r}, wanted one key, 'stillhouse', with text"
            )
    most_targets = len(recipe.chunk_rows(number)) * (recipe.sequence_length - 1)
    match header.get("targets"):
        case {"shape": [int(num_targets), _]} if 0 <= num_targets <= most_targets:
            tensors = _layout(recipe, number, num_targets)
        case found:
            raise ChunkError(
                f"{name} has targets of {found!r}, wanted a shape of 0 to {most_targets} records"
            )
    ends = list(accumulate((tensor.num_bytes for tensor in tensors), initial=0))
    wanted = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        for tensor, start, end in zip(tensors, ends[:-1], ends[1:], strict=True)
    }
    for key in sorted({*wanted, *header} - {"__metadata__"}):
        if header.get(key) != wanted.get(key):
            raise ChunkError(
                f"{name} has the tensor {key} {header.get(key)}, wanted {wanted.get(key)}"
            )
    return tensors, metadata.get("xxh3")


def _check_metadata(found: dict[str, Any], recipe: Recipe, number: int) -> None:
    wanted = _metadata(recipe, number)
    for key in sorted({*wanted, *found} - {"xxh3"}):
        if key not in found or key not in wanted or found[key] != wanted[key]:
            raise ChunkError(
                f"chunk {number} has {key} {found.get(key)!r}, wanted {wanted.get(key)!r}: it is "
                "damaged, or of another recipe"
            )


def _check_checksum(found: Any, index: bytes, header_bytes: int, name: str) -> None:
    num_fields = index.count(_CHECKSUM_FIELD, 0, _LENGTH_BYTES + header_bytes)
    if num_fields != 1:
        raise ChunkError(f"{name} has {num_fields} checksums in its header, wanted 1")
    start = index.index(_CHECKSUM_FIELD) + len(_CHECKSUM_FIELD)
    blank = index[:start] + b"0" * _CHECKSUM_DIGITS + index[start + _CHECKSUM_DIGITS :]
    wanted = xxhash.xxh3_64_hexdigest(blank)
    if found != wanted:
        raise ChunkError(
            f"{name} is damaged: it carries the checksum {found!r}, its first {len(index)} bytes "
            f"have {wanted!r}"
        )


def _check_rows(chunk: Chunk, recipe: Recipe) -> None:
    """What the hashes cannot tell: that these values mean something."""
    name = _name(chunk.number)
    ids, positions, mask = chunk.sequences.arrays
    if len(ids) and (ids.min() < 0 or ids.max() >= recipe.vocab_size):
        raise ChunkError(
            f"{name} has token ids from {ids.min()} to {ids.max()}, wanted 0 to "
            f"{recipe.vocab_size - 1}"
        )
    if mask.any() and (mask.max() > 1 or mask[:, -1].any()):
        raise ChunkError(
            f"{name} has a loss_mask that is not 0 or 1, or that is not 0 in the last column"
        )
    restarts = positions[:, 1:] == 0
    if positions[:, 0].any() or not (restarts | (positions[:, 1:] == positions[:, :-1] + 1)).all():
        raise ChunkError(f"{name} has positions that neither count up nor restart at 0")
    if (mask[:, :-1].astype(bool) & restarts).any():
        raise ChunkError(
            f"{name} has a loss_mask of 1 at the last token of a document, whose next token is of "
            "another"
        )
