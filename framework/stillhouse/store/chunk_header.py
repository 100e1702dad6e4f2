"""The header of a chunk's file: its tensors, its metadata and the checksum of the index.

The header is that of a safetensors file: 8 bytes of length, then JSON. The metadata is a JSON text
inside that JSON. The index, which the checksum covers, is the header and the two tensors after it:
the row hashes and the row starts.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import xxhash

from stillhouse.errors import ChunkError
from stillhouse.store.recipe import Recipe, canonical_json

Buffer = bytes | memoryview

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 8192
START_BYTES = LENGTH_BYTES + MAX_HEADER_BYTES  # in which every header ends

# as it stands in the header, where the metadata is a JSON text inside a JSON text
_CHECKSUM_FIELD = b'\\"xxh3\\":\\"'
_CHECKSUM_DIGITS = 16
_DTYPES: dict[str, np.dtype[Any]] = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as the header describes it."""

    name: str
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return _DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize


def layout(recipe: Recipe, number: int, num_targets: int) -> list[TensorSpec]:
    """The tensors of a chunk in the order of their bytes."""
    rows, length = len(recipe.chunk_rows(number)), recipe.sequence_length
    return [
        TensorSpec("row_xxh3", "U64", (rows,)),
        TensorSpec("row_starts", "I64", (rows + 1,)),
        TensorSpec("positions", "I32", (rows, length)),
        TensorSpec("token_ids", "I32", (rows, length)),
        TensorSpec("loss_mask", "U8", (rows, length)),
        TensorSpec("targets", "U8", (num_targets, recipe.spec.bytes_per_token)),
    ]


def index_end(header_bytes: int, num_rows: int) -> int:
    """Where the index ends in the file: after the header, the row hashes and the row starts."""
    return LENGTH_BYTES + header_bytes + 8 * num_rows + 8 * (num_rows + 1)


def header_length(start: Buffer) -> int:
    """Bytes of the header, by the first bytes of the file."""
    return int.from_bytes(start[:LENGTH_BYTES], "little")


def blank_metadata(recipe: Recipe, number: int) -> dict[str, str]:
    """safetensors' metadata of a chunk, with zeros in the place of the checksum."""
    blank = {**_metadata(recipe, number), "xxh3": "0" * _CHECKSUM_DIGITS}
    return {"stillhouse": canonical_json(blank).decode("ascii")}


def with_checksum(data: bytes, num_rows: int) -> bytes:
    """The file with the checksum of its index in the place of the zeros."""
    start = _checksum_start(data)
    checksum = xxhash.xxh3_64_hexdigest(data[: index_end(header_length(data), num_rows)])
    end = start + _CHECKSUM_DIGITS
    return b"".join([data[:start], checksum.encode("ascii"), memoryview(data)[end:]])


def checksum_of(data: bytes) -> str:
    """The checksum that a packed chunk carries: 16 hexadecimal digits."""
    start = _checksum_start(data)
    return data[start : start + _CHECKSUM_DIGITS].decode("ascii")


def is_whole(start: Buffer, *, num_bytes: int, last: str = "targets") -> bool:
    """Whether a file of `num_bytes` is as long as its first `START_BYTES` say: up to the end of its
    `last` tensor. A cheap check that finds what was cut short; not all damage."""
    header_bytes = header_length(start)
    try:
        header = json.loads(bytes(start[LENGTH_BYTES : LENGTH_BYTES + header_bytes]))
        return bool(num_bytes == LENGTH_BYTES + header_bytes + header[last]["data_offsets"][1])
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def parse_header(text: bytes, recipe: Recipe, number: int) -> tuple[list[TensorSpec], Any]:
    """Verify a header. Returns the tensors in the order of their bytes, and the checksum as it is
    claimed. Raises ChunkError."""
    name = f"chunk {number}"
    header = parse_object(text, f"the header of {name}")
    # the metadata
    metadata = metadata_of(header, name)
    _check_metadata(metadata, recipe, number)
    # the number of targets, which decides the layout
    most_targets = len(recipe.chunk_rows(number)) * (recipe.sequence_length - 1)
    match header.get("targets"):
        case {"shape": [int(num_targets), _]} if 0 <= num_targets <= most_targets:
            tensors = layout(recipe, number, num_targets)
        case found:
            raise ChunkError(
                f"{name} has targets of {found!r}, wanted a shape of 0 to {most_targets} records"
            )
    check_tensors(header, tensors, name)
    return tensors, metadata.get("xxh3")


def metadata_of(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a header says of its file. Raises ChunkError."""
    match header.get("__metadata__"):
        case {"stillhouse": str(inner), **others} if not others:
            return parse_object(inner.encode("utf-8", "replace"), f"the metadata of {name}")
        case found:
            raise ChunkError(
                f"{name} has the metadata {found!r}, wanted one key, 'stillhouse', with text"
            )


def check_tensors(header: Mapping[str, Any], tensors: Sequence[TensorSpec], name: str) -> None:
    """Raise ChunkError unless a header has these tensors, one right after the other, and no
    others."""
    offsets = pairwise(accumulate((tensor.num_bytes for tensor in tensors), initial=0))
    wanted = {
        tensor.name: {"dtype": tensor.dtype, "shape": [*tensor.shape], "data_offsets": [*span]}
        for tensor, span in zip(tensors, offsets, strict=True)
    }
    for key in sorted({*wanted, *header} - {"__metadata__"}):
        if header.get(key) != wanted.get(key):
            raise ChunkError(
                f"{name} has the tensor {key} {header.get(key)}, wanted {wanted.get(key)}"
            )


def check_checksum(found: Any, index: bytes, number: int) -> None:
    """Raise ChunkError unless the index has the checksum that its header claims."""
    num_fields = index.count(_CHECKSUM_FIELD, 0, LENGTH_BYTES + header_length(index))
    if num_fields != 1:
        raise ChunkError(f"chunk {number} has {num_fields} checksums in its header, wanted 1")
    start = _checksum_start(index)
    blank = index[:start] + b"0" * _CHECKSUM_DIGITS + index[start + _CHECKSUM_DIGITS :]
    wanted = xxhash.xxh3_64_hexdigest(blank)
    if found != wanted:
        raise ChunkError(
            f"chunk {number} is damaged: it carries the checksum {found!r}, its first {len(index)} "
            f"bytes have {wanted!r}"
        )


def _checksum_start(data: bytes) -> int:
    return data.index(_CHECKSUM_FIELD) + len(_CHECKSUM_FIELD)


def _metadata(recipe: Recipe, number: int) -> dict[str, Any]:
    return {"chunk": number, "fingerprint": recipe.fingerprint, **recipe.target_values}


def _check_metadata(found: dict[str, Any], recipe: Recipe, number: int) -> None:
    wanted = _metadata(recipe, number)
    for key in sorted({*wanted, *found} - {"xxh3"}):
        if key not in found or key not in wanted or found[key] != wanted[key]:
            raise ChunkError(
                f"chunk {number} has {key} {found.get(key)!r}, wanted {wanted.get(key)!r}: it is "
                "damaged, or of another recipe"
            )


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """The object that a text of JSON is. Raises ChunkError, naming `what`."""
    try:
        value = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ChunkError(f"{what} is damaged: it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ChunkError(
            f"{what} is damaged: it is a JSON {type(value).__name__}, wanted an object"
        )
    return value
