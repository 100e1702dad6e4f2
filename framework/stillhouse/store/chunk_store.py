"""The chunks of one recipe, in a store that many machines share: existence is the commit, so
publishing twice is harmless.

<root>/<first 16 digits of the fingerprint>/recipe.json <root>/<the
same>/chunks/0000000012.safetensors         created once, never changed <root>/<the
same>/quarantine/                           chunks that were found bad, out of the readers' sight
<root>/<the same>/readers/                              who reads them, and how far: see readers.py
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stillhouse.errors import ChunkError, RecipeError, StoreError
from stillhouse.logits.codec import decode
from stillhouse.store.chunk import (
    START_BYTES,
    Chunk,
    ChunkIndex,
    checksum_of,
    index_bytes,
    is_whole,
    pack_chunk,
    parse_index,
    unpack_chunk,
    unpack_rows,
)
from stillhouse.store.explain import explain
from stillhouse.store.object_store import Blob, Blobs, NotAFileError
from stillhouse.store.probe import require_create_only
from stillhouse.store.recipe import Recipe, differences, parse_recipe

_CHUNK_KEY = re.compile(r"[0-9a-f]{16}/chunks/([0-9]{10})\.safetensors")
_FINGERPRINT16 = re.compile(r"[0-9a-f]{16}")
_STAGING_FILE = re.compile(r".+#\d+")  # what a killed writer leaves in a directory
_MOST_INDEXES = 1024


class ChunkMissing(StoreError):
    """The chunk has not been published yet."""


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """What a publisher tells the others about a chunk: no tensor."""

    name: str  # the key of the chunk under the root
    number: int
    num_tokens: int  # tokens that have a target
    num_bytes: int
    checksum: str  # of the bytes offered; if `duplicate`, another publisher's are in the store
    duplicate: bool


class StoredRecipe(NamedTuple):
    fingerprint16: str
    recipe: Recipe
    num_chunks: int
    num_bytes: int


class Finding(NamedTuple):
    """What `verify_store` found of one object: `problem` is None where all is well."""

    key: str
    number: int | None  # of the chunk, where it is one
    problem: str | None


class Listing(NamedTuple):
    """The numbers of the chunks in a store."""

    published: set[int]
    cut: set[
        int
        # that are not as long as they say themselves: what a power cut may leave of a file that was
        # not on disk yet
    ]


class Swept(NamedTuple):
    removed: list[str]  # leftovers of killed writers, as paths
    quarantined: list[str]  # keys, for a person to look at


class ChunkStore:
    """One recipe's chunks under a root. Made without touching the store, safe to share among
    threads and to send to other processes."""

    def __init__(self, root: str | Blobs, recipe: Recipe) -> None:
        self._blobs = root if isinstance(root, Blobs) else Blobs(root)
        self.recipe = recipe
        self._folder = recipe.fingerprint[:16]
        self._indexes: dict[int, ChunkIndex] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(cls, root: str | Blobs, recipe: Recipe) -> "ChunkStore":
        """The store of this recipe, its recipe.json published. Raises RecipeError if another recipe
        is there, StoreError if it cannot.

        The store has to refuse to create what is there already, and is tried for that.
        """
        store = cls(root, recipe)
        require_create_only(store._blobs, under=f"{store._folder}/")
        if (
            not store._blobs.create(store.recipe_key, recipe.canonical_json())
            and not store.has_recipe()
        ):
            store.restore_recipe()
        return store

    def has_recipe(self) -> bool:
        """Whether recipe.json is there; a power cut may have left its name alone. Raises
        RecipeError if it is of another recipe."""
        try:
            if self._blobs.read(self.recipe_key).nbytes == 0:
                return False
        except FileNotFoundError:
            return False
        found = _recipe_at(self._blobs, self.recipe_key)
        if found != self.recipe:
            raise RecipeError(
                f"{self.url}/{self.recipe_key} is of another recipe: "
                + "; ".join(differences(self.recipe, found))
            )
        return True

    @property
    def url(self) -> str:
        return self._blobs.url

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
        data, key = pack_chunk(chunk, self.recipe), self.key(chunk.number)
        try:
            created = self._blobs.create(key, data)
        except NotAFileError:
            created = False
        if not created and not self.is_whole(chunk.number) and self.quarantine(chunk.number):
            created = self._blobs.create(key, data)
        return ChunkRef(
            key,
            chunk.number,
            len(chunk.targets_NB),
            len(data),
            checksum_of(data),
            duplicate=not created,
        )

    def exists(self, number: int) -> bool:
        """Whether there is an object of the chunk's name, whatever its bytes are."""
        return self._blobs.stat(self.key(number)) is not None

    def is_whole(self, number: int) -> bool:
        """Whether the chunk is there, and as long as it says itself; its other bytes are not looked
        at."""
        try:
            head, num_bytes = self._blobs.read_start(self.key(number), START_BYTES)
        except (FileNotFoundError, NotAFileError):
            return False
        return is_whole(head, num_bytes=num_bytes)

    def published(self) -> set[int]:
        """The numbers of the chunks that are there, as `listing` tells."""
        return self.listing().published

    def listing(self) -> Listing:
        """The chunks that are there. In a directory each one is opened, for it may be cut short; an
        object in a bucket is whole."""
        blobs = self._blobs.under(f"{self._folder}/chunks")
        there = {number for blob in blobs if (number := _number_of(blob.key)) is not None}
        may_be_cut = there if self._blobs.directory is not None else ()
        cut = {
            number
            for number in may_be_cut
            if number < self.recipe.num_chunks and not self.is_whole(number)
        }
        return Listing(there - cut, cut)

    def fetch(self, number: int) -> Chunk:
        """A whole chunk, verified. Raises ChunkMissing if it is not there yet, ChunkError if two
        requests of two kinds find it bad."""
        key = self.key(number)
        with self._reading(number):
            try:
                return unpack_chunk(self._blobs.read(key), self.recipe, number)
            except ChunkError:  # perhaps on the way alone
                again = b"".join(self._blobs.pieces(key))
        return unpack_chunk(memoryview(again), self.recipe, number)

    def fetch_rows(self, number: int, rows: Sequence[int] | npt.NDArray[np.int64]) -> Chunk:
        """These rows of a chunk (0 .. S - 1, in the order asked), read by byte range and verified
        by their hashes.

        Raises ChunkMissing if the chunk is not there yet, ChunkError if what was read of it is bad,
        and is so when it is read once more, IndexError on a row it cannot have.
        """
        rows, num_rows = [int(row) for row in rows], len(self.recipe.chunk_rows(number))
        for row in rows:
            if not 0 <= row < num_rows:
                raise IndexError(f"chunk {number} has rows 0 to {num_rows - 1}, not {row}")
        with self._lock:
            known = self._indexes.get(number)
        if known is not None:
            try:
                return self._read_rows(known, rows)
            except (ChunkError, ChunkMissing):
                # it may have been repaired since its index was read, by other bytes: see with a new
                # index
                pass
        try:
            index, chunk = self._read_anew(number, rows)
        except ChunkError:  # perhaps on the way alone
            index, chunk = self._read_anew(number, rows)
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
        """Move a chunk out of the readers' sight, unless it verifies. True if it must be published
        anew; False if it is good after all."""
        try:
            self.verify(number)
        except ChunkMissing:
            return True
        except ChunkError:
            self._move_aside(number)
            return True
        return False

    def delete(self, *numbers: int) -> None:
        """Take chunks away for good, because nobody will read them again; one that is gone already
        is no error."""
        self._blobs.delete(*map(self.key, numbers))

    @property
    def blobs(self) -> Blobs:
        return self._blobs

    @property
    def folder(self) -> str:
        """The recipe's folder under the root."""
        return self._folder

    @property
    def recipe_key(self) -> str:
        return f"{self._folder}/recipe.json"

    def restore_recipe(self) -> bool:
        """Publish recipe.json anew if it is missing or damaged; a damaged one goes to quarantine.
        True if it had to be."""
        key = self.recipe_key
        blob = self._blobs.stat(key)
        if blob is not None and self.recipe.canonical_json() in (
            bytes(self._blobs.read(key)),
            b"".join(self._blobs.pieces(key)),
        ):
            return False
        if blob is not None:
            self._blobs.move(key, f"{self._folder}/quarantine/recipe-{_moment(blob)}.json")
        self._blobs.create(key, self.recipe.canonical_json())
        return True

    def findings(self) -> Iterator[Finding]:
        """Read every chunk and say of each object among them whether it is good, or why not.
        Changes nothing."""
        for blob in self._blobs.under(f"{self._folder}/chunks"):
            yield Finding(blob.key, _number_of(blob.key), _problem_with(self, blob))

    def key(self, number: int) -> str:
        self.recipe.chunk_rows(number)
        return f"{self._folder}/chunks/{number:010d}.safetensors"

    def _move_aside(self, number: int) -> None:
        blob = self._blobs.stat(self.key(number))
        if blob is None:
            return
        try:
            self._blobs.move(
                blob.key, f"{self._folder}/quarantine/{number:010d}-{_moment(blob)}.safetensors"
            )
        except FileNotFoundError:
            return  # somebody else did

    def _read_anew(self, number: int, rows: Sequence[int]) -> tuple[ChunkIndex, Chunk]:
        index = self._read_index(number)
        return index, self._read_rows(index, rows)

    def _read_index(self, number: int) -> ChunkIndex:
        with self._reading(number):
            head, num_bytes = self._blobs.read_start(
                self.key(number), index_bytes(self.recipe, number)
            )
        return parse_index(head, self.recipe, number, num_bytes=num_bytes)

    def _read_rows(self, index: ChunkIndex, rows: Sequence[int]) -> Chunk:
        extents = [extent for row in rows for extent in index.row_extents(row)]
        with self._reading(index.number):
            pieces = self._blobs.read_extents(self.key(index.number), extents)
        return unpack_rows(index, rows, [pieces[i : i + 4] for i in range(0, len(pieces), 4)])

    @contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Say of a chunk that it is not there, or that what is there is no file and so damaged."""
        try:
            yield
        except FileNotFoundError:
            raise ChunkMissing(
                f"chunk {number} is not in {self.url}/{self._folder}: it has not been published yet"
            ) from None
        except NotAFileError as error:
            raise ChunkError(f"chunk {number} is damaged: {error}") from None


def list_recipes(url: str) -> list[StoredRecipe]:
    """Every recipe under a root, with the number and bytes of its chunks. An unreadable recipe is
    left out: `verify_store` names it."""
    blobs, found = Blobs(url), []
    for folder in _recipe_folders(blobs):
        try:
            recipe = _recipe_in(blobs, folder)
        except RecipeError:
            continue
        sizes = [
            blob.num_bytes
            for blob in blobs.under(f"{folder}/chunks")
            if _number_of(blob.key) is not None
        ]
        found.append(StoredRecipe(folder, recipe, len(sizes), sum(sizes)))
    return found


def verify_store(url: str) -> Iterator[Finding]:
    """Read everything under a root and say of each object whether it is good, or why not. Changes
    nothing."""
    blobs = Blobs(url)
    for folder in _recipe_folders(blobs):
        try:
            store = ChunkStore(url, _recipe_in(blobs, folder))
        except RecipeError as error:
            yield Finding(f"{folder}/recipe.json", None, str(error))
            continue
        yield Finding(f"{folder}/recipe.json", None, None)
        yield from store.findings()


def sweep(url: str, *, older_than_s: float, now: float) -> Swept:
    """Remove what killed writers left in a local store, and list the quarantine.

    A leftover is removed once it is `older_than_s` at `now` (seconds since 1970): a writer that
    still lives may own a younger one.
    """
    blobs, removed = Blobs(url), []
    for folder in _recipe_folders(blobs):
        for path in _staging_files(blobs.directory / folder) if blobs.directory is not None else []:
            try:
                if path.stat().st_mtime <= now - older_than_s:
                    path.unlink()
                    removed.append(str(path))
            except FileNotFoundError:
                continue  # its writer lives, and has just given it its name
            except OSError as error:
                raise explain(error, doing=f"remove {folder}/{path.name}", url=blobs.url) from error
    quarantined = [
        blob.key
        for folder in _recipe_folders(blobs)
        for blob in blobs.under(f"{folder}/quarantine")
    ]
    return Swept(removed, quarantined)


def _moment(blob: Blob) -> str:
    """When it was published, as a part of a name."""
    return blob.modified.strftime("%Y%m%dT%H%M%S.%f")


def _number_of(key: str) -> int | None:
    match = _CHUNK_KEY.fullmatch(key)
    return int(match[1]) if match else None


def _recipe_folders(blobs: Blobs) -> list[str]:
    return [folder for folder in blobs.folders() if _FINGERPRINT16.fullmatch(folder)]


def _recipe_at(blobs: Blobs, key: str) -> Recipe:
    """Raises RecipeError where two requests of two kinds say that it is none."""
    where = f"{blobs.url}/{key}"
    try:
        return parse_recipe(bytes(blobs.read(key)), where=where)
    except RecipeError:  # perhaps on the way alone
        return parse_recipe(b"".join(blobs.pieces(key)), where=where)


def _recipe_in(blobs: Blobs, folder: str) -> Recipe:
    where = f"{blobs.url}/{folder}/recipe.json"
    try:
        recipe = _recipe_at(blobs, f"{folder}/recipe.json")
    except FileNotFoundError:
        raise RecipeError(f"{where} is missing: nobody can tell what its chunks are of") from None
    if recipe.fingerprint[:16] != folder:
        raise RecipeError(
            f"{where} has the fingerprint {recipe.fingerprint[:16]}, its directory is named "
            f"{folder}: it was moved or edited"
        )
    return recipe


def _problem_with(store: ChunkStore, blob: Blob) -> str | None:
    number = _number_of(blob.key)
    if number is None:
        return "this is not the name of a chunk: nobody reads it"
    try:
        store.verify(number)
    except (ChunkError, RecipeError, ChunkMissing) as error:
        return str(error)
    return None


def _staging_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if _STAGING_FILE.fullmatch(path.name) and path.is_file()
    )
