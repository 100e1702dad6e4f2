"""Files of a store and lines of a journal with checksums that are right whatever they hold: nothing
here imports stillhouse.

Those of a store are written from docs/format.md alone.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from helpers.pagereader import DTYPES, same_as_recipe

_CHECKSUM = b'\\"xxh3\\":\\"'
_ORDER = {
    "row_xxh3": "U64",
    "row_starts": "I64",
    "positions": "I32",
    "token_ids": "I32",
    "loss_mask": "U8",
    "targets": "U8",
}

Arrays = dict[str, np.ndarray]  # by the tensors' names; row_xxh3 is computed


def canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode("ascii")


def sealed_line(**values: Any) -> bytes:
    """A line of a journal."""
    line = json.dumps(values).encode()
    return line[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(line)


def metadata_of(recipe: dict[str, Any], number: int) -> dict[str, Any]:
    fingerprint = hashlib.sha256(canonical(recipe)).hexdigest()
    return {key: recipe[key] for key in same_as_recipe(recipe)} | {
        "chunk": number,
        "fingerprint": fingerprint,
        "xxh3": "0" * 16,
    }


def header_of(arrays: Arrays, metadata: bytes) -> dict[str, Any]:
    """The header that describes these arrays, with the text of the metadata as it is given."""
    header: dict[str, Any] = {
        "__metadata__": {"stillhouse": metadata.decode("utf-8", "surrogatepass")}
    }
    start = 0
    for name, dtype in _ORDER.items():
        array = arrays[name] if name in arrays else np.empty(len(arrays["row_starts"]) - 1, "<u8")
        end = start + array.size * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    return header


def chunk_file(arrays: Arrays, header: bytes) -> bytes:
    """The file of a chunk, with right row hashes, and a right checksum where the header has a place
    for one."""
    header += b" " * (-len(header) % 8)
    hashes = np.array(_row_hashes(arrays), "<u8")
    tensors = [
        {**arrays, "row_xxh3": hashes}[name].astype(DTYPES[dtype]).tobytes()
        for name, dtype in _ORDER.items()
    ]
    return sealed_chunk(
        struct.pack("<Q", len(header)) + header + b"".join(tensors), num_rows=len(hashes)
    )


def sealed_chunk(data: bytes, *, num_rows: int) -> bytes:
    """The same with the checksum of its index in its place, if there is one."""
    end = 8 + struct.unpack("<Q", data[:8])[0] + 16 * num_rows + 8
    at = data.find(_CHECKSUM) + len(_CHECKSUM)
    if at < len(_CHECKSUM):
        return data
    blank = data[:at] + b"0" * 16 + data[at + 16 :]
    return data[:at] + xxhash.xxh3_64_hexdigest(blank[:end]).encode() + data[at + 16 :]


def sealed_json(values: Mapping[str, Any], *, sort_keys: bool = False) -> dict[str, Any]:
    """With the checksum of all the other values, as readers and owners have it."""
    text = (
        canonical(dict(values)) if sort_keys else json.dumps(dict(values), sort_keys=True).encode()
    )
    return {**values, "xxh3": xxhash.xxh3_64_hexdigest(text)}


def _row_hashes(arrays: Arrays) -> list[int]:
    """Row by row, as far as `row_starts` says what a row is."""
    starts, records = arrays["row_starts"].tolist(), arrays["targets"]
    rows = range(len(starts) - 1)
    columns = [arrays[name] for name in ("token_ids", "positions", "loss_mask")]
    pieces = [
        [
            column[row].astype(DTYPES[_ORDER[name]]).tobytes()
            for column, name in zip(columns, ("token_ids", "positions", "loss_mask"), strict=True)
        ]
        for row in rows
    ]
    ends = [max(0, min(len(records), end)) for end in starts]
    return [
        xxhash.xxh3_64_intdigest(
            b"".join(pieces[row]) + records[ends[row] : ends[row + 1]].tobytes()
        )
        for row in rows
    ]
