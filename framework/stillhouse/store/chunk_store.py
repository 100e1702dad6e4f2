"""The chunks of one recipe, in a store that many machines share: existence is the commit, so
publishing twice is harmless.

<root>/<first 16 digits of the fingerprint>/recipe.json
<root>/<the same>/chunks/20/0000000012.safetensors      created once, never changed
<root>/<the same>/quarantine/                           chunks that were found bad; never read
<root>/<the same>/readers/                              its consumers: see consumers.py

In format 1 chunks lie in chunks/ itself.
"""

import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from stillhouse.errors import ChunkError, RecipeError
from stillhouse.logits.codec import decode
from stillhouse.store.chunk import (
    Chunk,
    ChunkIndex,
    index_bytes,
    pack_chunk,
    parse_index,
    unpack_chunk,
    unpack_rows,
)
from stillhouse.store.chunk_header import checksum_of
from stillhouse.store.numbered import ChunkMissing, NumberedStore
from stillhouse.store.object_store import Blobs
from stillhouse.store.recipe import Recipe, differences, parse_recipe

_CHUNK_KEY = re.compile(r"[0-9a-f]{16}/chunks/((?:[0-9a-f]{2}/)?([0-9]{10})\.safetensors)")
_MOST_INDEXES = 1024


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """What is reported of a published chunk: no tensor."""

    name: str  # the key of the chunk under the root
    number: int
    num_tokens: int  # tokens that have a target
    num_bytes: int
    checksum: str  # of the bytes offered; if `duplicate`, another publisher's are in the store
    duplicate: bool


class ChunkStore(NumberedStore[Recipe]):
    """The chunks of one recipe under a root. Thread-safe and picklable; making one sends no
    request."""

    noun, _above, _objects, _last_tensor = "chunk", "", "chunks", "targets"

    def __init__(self, root: str | Blobs, recipe: Recipe) -> None:
        super().__init__(root, recipe)
        self._indexes: dict[int, ChunkIndex] = {}
        self._lock = threading.Lock()

    def publish(self, chunk: Chunk) -> ChunkRef:
        """Pack and put a chunk: one create-only put, so it is there whole or not at all, and the
        first publisher wins.

        A file that a power cut left in its place, empty or cut short, goes to quarantine first, as
        does anything there that is no file. Raises ChunkError on a chunk that is not of the recipe,
        StoreUnavailable if another try may help, StoreError if it cannot.
        """
        data, number = pack_chunk(chunk, self.recipe), chunk.number
        created = self._put(number, data)
        key, num_tokens, checksum = self.key(number), len(chunk.targets_NB), checksum_of(data)
        return ChunkRef(key, number, num_tokens, len(data), checksum, duplicate=not created)

    def fetch(self, number: int) -> Chunk:
        """A whole chunk, verified. Raises ChunkMissing if it is not there yet, ChunkError if two
        requests of two kinds find it bad."""
        chunk: Chunk = self._whole(number, lambda data: unpack_chunk(data, self.recipe, number))
        return chunk

    def fetch_rows(self, number: int, rows: Sequence[int] | npt.NDArray[np.int64]) -> Chunk:
        """These rows of a chunk (0 .. S - 1, in the order of `rows`), read by byte range and
        verified by their hashes.

        Raises ChunkMissing if the chunk is not there yet, ChunkError if what is read of it is bad
        twice, IndexError on a row it cannot have.
        """
        rows, num_rows = [int(row) for row in rows], len(self.recipe.chunk_rows(number))
        for row in rows:
            if not 0 <= row < num_rows:
                raise IndexError(f"chunk {number} has rows 0 to {num_rows - 1}, not {row}")
        # by a known index: one request
        with self._lock:
            known = self._indexes.get(number)
        if known is not None:
            # the chunk may have been made again since, with other bytes and another index
            with suppress(ChunkError, ChunkMissing):
                return self._read_rows(known, rows)
        # by a new index, once more where the bytes were perhaps damaged on the way alone
        try:
            index, chunk = self._read_anew(number, rows)
        except ChunkError:
            index, chunk = self._read_anew(number, rows)
        # the index is kept for the next rows, in place of the oldest
        with self._lock:
            self._indexes.pop(number, None)
            self._indexes[number] = index
            if len(self._indexes) > _MOST_INDEXES:
                del self._indexes[next(iter(self._indexes))]
        return chunk

    def verify(self, number: int) -> None:
        """Read a whole chunk and decode every record. Raises ChunkMissing or ChunkError."""
        chunk = self.fetch(number)
        try:
            decode(torch.from_numpy(chunk.targets_NB), self.recipe.spec)
        except ChunkError as error:
            raise ChunkError(f"chunk {number} is as it was published, but {error}") from None

    def key(self, number: int) -> str:
        """A chunk's key under the root. Raises RecipeError on a number that the recipe does not
        have."""
        self.recipe.chunk_rows(number)
        return f"{self.folder}/chunks/{_chunk_name(number, self.recipe.format)}"

    def rows(self, number: int) -> range:
        """The sequences of chunk `number` in the corpus. Raises RecipeError as `key` does."""
        return self.recipe.chunk_rows(number)

    def _number_of(self, key: str) -> int | None:
        return number_of(key, self.recipe.format)

    def _differences_to(self, key: str) -> list[str]:
        return differences(self.recipe, recipe_at(self.blobs, key))

    @property
    def _num_objects(self) -> int:
        return self.recipe.num_chunks

    def _read_anew(self, number: int, rows: Sequence[int]) -> tuple[ChunkIndex, Chunk]:
        most_bytes = index_bytes(self.recipe, number)
        with self._reading(number):
            head, num_bytes = self.blobs.read_start(self.key(number), most_bytes)
        index = parse_index(head, self.recipe, number, num_bytes=num_bytes)
        return index, self._read_rows(index, rows)

    def _read_rows(self, index: ChunkIndex, rows: Sequence[int]) -> Chunk:
        extents = [extent for row in rows for extent in index.row_extents(row)]
        with self._reading(index.number):
            pieces = self.blobs.read_extents(self.key(index.number), extents)
        return unpack_rows(index, rows, [pieces[i : i + 4] for i in range(0, len(pieces), 4)])


def number_of(key: str, version: int) -> int | None:
    """The number of the chunk with this key in a store of format `version`; None where it is no
    chunk's key, as that of another format is not."""
    match = _CHUNK_KEY.fullmatch(key)
    return int(match[2]) if match and match[1] == _chunk_name(int(match[2]), version) else None


def _chunk_name(number: int, version: int) -> str:
    """A chunk's key under chunks/. Format 2 spreads chunks over 256 prefixes, by the XXH3 of the
    number's ten digits: object stores limit the requests to a prefix."""
    digits = f"{number:010d}"
    spread = "" if version == 1 else f"{xxhash.xxh3_64_hexdigest(digits.encode('ascii'))[:2]}/"
    return f"{spread}{digits}.safetensors"


def recipe_at(blobs: Blobs, key: str) -> Recipe:
    """The recipe under a key. Raises RecipeError if two requests of two kinds find it bad,
    FileNotFoundError if there is none."""
    where = f"{blobs.url}/{key}"
    try:
        return parse_recipe(bytes(blobs.read(key)), where=where)
    except RecipeError:  # perhaps damaged on the way alone
        return parse_recipe(b"".join(blobs.pieces(key)), where=where)
