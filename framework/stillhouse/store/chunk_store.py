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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from stillhouse.errors import ChunkError, RecipeError, StoreError
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
from stillhouse.store.chunk_header import START_BYTES, checksum_of, is_whole
from stillhouse.store.explain import NotAFileError
from stillhouse.store.object_store import Blob, Blobs
from stillhouse.store.probe import require_create_only
from stillhouse.store.recipe import Recipe, differences, parse_recipe

_CHUNK_KEY = re.compile(r"[0-9a-f]{16}/chunks/((?:[0-9a-f]{2}/)?([0-9]{10})\.safetensors)")
_MOST_INDEXES = 1024


class ChunkMissing(StoreError):
    """The chunk has not been published yet."""


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """What is reported of a published chunk: no tensor."""

    name: str  # the key of the chunk under the root
    number: int
    num_tokens: int  # tokens that have a target
    num_bytes: int
    checksum: str  # of the bytes offered; if `duplicate`, another publisher's are in the store
    duplicate: bool


class Listing(NamedTuple):
    """The numbers of the chunks in a store."""

    published: set[int]
    # shorter or longer than their own header says: a power cut leaves such a file where it was not
    # synced
    cut: set[int]


class ChunkStore:
    """The chunks of one recipe under a root. Thread-safe and picklable; making one sends no
    request."""

    def __init__(self, root: str | Blobs, recipe: Recipe) -> None:
        self.blobs = root if isinstance(root, Blobs) else Blobs(root)
        self.recipe = recipe
        self.folder = recipe.fingerprint[:16]  # the recipe's, under the root
        self.recipe_key = f"{self.folder}/recipe.json"
        self._indexes: dict[int, ChunkIndex] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(cls, root: str | Blobs, recipe: Recipe) -> "ChunkStore":
        """A store whose recipe.json is published. Raises RecipeError if another recipe is there,
        StoreError if the store cannot be written.

        It is also tried whether the store refuses to create what is there already.
        """
        store = cls(root, recipe)
        require_create_only(store.blobs, under=f"{store.folder}/")
        created = store.blobs.create(store.recipe_key, recipe.canonical_json())
        if not created and not store.has_recipe():
            store.restore_recipe()
        return store

    def has_recipe(self) -> bool:
        """Whether recipe.json is there; an empty file, as a power cut may leave it, is none. Raises
        RecipeError if it is of another recipe."""
        try:
            if self.blobs.read(self.recipe_key).nbytes == 0:
                return False
        except FileNotFoundError:
            return False
        found = recipe_at(self.blobs, self.recipe_key)
        if found != self.recipe:
            raise RecipeError(
                f"{self.url}/{self.recipe_key} is of another recipe: "
                + "; ".join(differences(self.recipe, found))
            )
        return True

    @property
    def url(self) -> str:
        return self.blobs.url

    def __reduce__(self) -> tuple[Callable[..., "ChunkStore"], tuple[str, Recipe]]:
        if self.url.startswith("memory:"):
            raise StoreError(
                f"{self.url} lives in one process and cannot be sent to another; set store.url to "
                "a directory or a bucket"
            )
        return ChunkStore, (self.url, self.recipe)

    def publish(self, chunk: Chunk) -> ChunkRef:
        """Pack and put a chunk: one create-only put, so it is there whole or not at all, and the
        first publisher wins.

        A file that a power cut left in its place, empty or cut short, goes to quarantine first, as
        does anything there that is no file. Raises ChunkError on a chunk that is not of the recipe,
        StoreUnavailable if another try may help, StoreError if it cannot.
        """
        data, number = pack_chunk(chunk, self.recipe), chunk.number
        key, created = self.key(number), False
        with suppress(NotAFileError):
            created = self.blobs.create(key, data)
        # what a power cut left is replaced; another publisher's whole chunk stays
        if not created and not self.is_whole(number) and self.quarantine(number):
            created = self.blobs.create(key, data)
        num_tokens, checksum = len(chunk.targets_NB), checksum_of(data)
        return ChunkRef(key, number, num_tokens, len(data), checksum, duplicate=not created)

    def exists(self, number: int) -> bool:
        """Whether there is an object of the chunk's name, whatever its bytes are."""
        return self.blobs.stat(self.key(number)) is not None

    def is_whole(self, number: int) -> bool:
        """Whether the chunk is there, and as long as it says itself; its other bytes are not looked
        at."""
        try:
            head, num_bytes = self.blobs.read_start(self.key(number), START_BYTES)
        except (FileNotFoundError, NotAFileError):
            return False
        return is_whole(head, num_bytes=num_bytes)

    def published(self) -> set[int]:
        """The numbers of the chunks that are there, by `listing`."""
        return self.listing().published

    def listing(self) -> Listing:
        """The chunks that are there. In a directory each one is opened, since it may be cut short;
        an object in a bucket is whole."""
        blobs, version = self.blobs.under(f"{self.folder}/chunks"), self.recipe.format
        there = {number for blob in blobs if (number := number_of(blob.key, version)) is not None}
        if self.blobs.directory is None:
            return Listing(there, cut=set())
        known = {number for number in there if number < self.recipe.num_chunks}
        cut = {number for number in known if not self.is_whole(number)}
        return Listing(there - cut, cut)

    def fetch(self, number: int) -> Chunk:
        """A whole chunk, verified. Raises ChunkMissing if it is not there yet, ChunkError if two
        requests of two kinds find it bad."""
        key = self.key(number)
        with self._reading(number):
            try:
                return unpack_chunk(self.blobs.read(key), self.recipe, number)
            except ChunkError:  # perhaps damaged on the way alone
                again = b"".join(self.blobs.pieces(key))
        return unpack_chunk(memoryview(again), self.recipe, number)

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

    def quarantine(self, number: int) -> bool:
        """Move a chunk into quarantine/, where no reader looks, unless it verifies. True if it must
        be published anew; False if it is good after all."""
        try:
            self.verify(number)
            return False
        except ChunkMissing:
            return True
        except ChunkError:
            blob = self.blobs.stat(self.key(number))
        if blob is not None:
            name = f"{number:010d}-{_moment(blob)}.safetensors"
            with suppress(FileNotFoundError):  # another process was first
                self.blobs.move(blob.key, f"{self.folder}/quarantine/{name}")
        return True

    def delete(self, *numbers: int) -> None:
        """Delete chunks that no consumer needs any more; one that is gone already is no error."""
        self.blobs.delete(*map(self.key, numbers))

    def restore_recipe(self) -> bool:
        """Publish recipe.json anew if it is missing or damaged; a damaged one goes to quarantine.
        True if it had to be."""
        key, data = self.recipe_key, self.recipe.canonical_json()
        blob = self.blobs.stat(key)
        if blob is not None:
            if data in (bytes(self.blobs.read(key)), b"".join(self.blobs.pieces(key))):
                return False
            self.blobs.move(key, f"{self.folder}/quarantine/recipe-{_moment(blob)}.json")
        self.blobs.create(key, data)
        return True

    def key(self, number: int) -> str:
        """A chunk's key under the root. Raises RecipeError on a number that the recipe does not
        have."""
        self.recipe.chunk_rows(number)
        return f"{self.folder}/chunks/{_chunk_name(number, self.recipe.format)}"

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

    @contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Name the chunk in the error: ChunkMissing where it is absent, ChunkError where something
        else than a file is there."""
        try:
            yield
        except FileNotFoundError:
            raise ChunkMissing(
                f"chunk {number} is not in {self.url}/{self.folder}: it has not been published yet"
            ) from None
        except NotAFileError as error:
            raise ChunkError(f"chunk {number} is damaged: {error}") from None


def _moment(blob: Blob) -> str:
    """When an object was published, as a part of a name."""
    return blob.modified.strftime("%Y%m%dT%H%M%S.%f")


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
