"""Numbered objects of one recipe, in a store that many machines share: existence is the commit, so
publishing twice is harmless.

`NumberedStore` holds what is the same for chunks and for shards of rollouts; see its subclasses for
the keys.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

from stillhouse.errors import ChunkError, RecipeError, StoreError
from stillhouse.store.chunk_header import START_BYTES, is_whole
from stillhouse.store.explain import NotAFileError
from stillhouse.store.object_store import Blob, Blobs
from stillhouse.store.probe import require_create_only


class ChunkMissing(StoreError):
    """The chunk, or the shard, has not been published yet."""


class Listing(NamedTuple):
    """The numbers of the chunks, or of the shards, in a store."""

    published: set[int]
    # shorter or longer than their own header says: a power cut leaves such a file where it was not
    # synced
    cut: set[int]


class AnyRecipe(Protocol):
    """What decides the objects of a store, in clear."""

    @property
    def fingerprint(self) -> str: ...

    def canonical_json(self) -> bytes: ...


RecipeT = TypeVar("RecipeT", bound=AnyRecipe)


class NumberedStore(ABC, Generic[RecipeT]):
    """The objects of one recipe under a root. Thread-safe and picklable; making one sends no
    request."""

    noun: ClassVar[str]  # of one object, in messages
    _above: ClassVar[str]  # the keys' part before the recipe's folder
    _objects: ClassVar[str]  # the folder of the objects, in the recipe's
    _last_tensor: ClassVar[str]  # whose end is that of the file

    def __init__(self, root: str | Blobs, recipe: RecipeT) -> None:
        self.blobs = root if isinstance(root, Blobs) else Blobs(root)
        self.recipe = recipe
        self.folder = f"{self._above}{recipe.fingerprint[:16]}"  # the recipe's, under the root
        self.recipe_key = f"{self.folder}/recipe.json"

    @classmethod
    def create(cls, root: str | Blobs, recipe: RecipeT) -> Self:
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

    @abstractmethod
    def key(self, number: int) -> str:
        """An object's key under the root. Raises RecipeError on a number that the recipe does not
        have."""

    @abstractmethod
    def rows(self, number: int) -> range:
        """The sequences of the corpus, or the prompts, that the object is made of. Raises
        RecipeError as `key` does."""

    @abstractmethod
    def verify(self, number: int) -> None:
        """Read a whole object, and all that is in it. Raises ChunkMissing or ChunkError."""

    @abstractmethod
    def _number_of(self, key: str) -> int | None:
        """The number of the object with this key; None where it is no object's key."""

    @abstractmethod
    def _differences_to(self, key: str) -> list[str]:
        """The fields in which the recipe under a key differs, in words. Raises RecipeError where it
        is damaged."""

    @property
    @abstractmethod
    def _num_objects(self) -> int: ...

    def has_recipe(self) -> bool:
        """Whether recipe.json is there; an empty file, as a power cut may leave it, is none. Raises
        RecipeError if it is of another recipe."""
        try:
            if self.blobs.read(self.recipe_key).nbytes == 0:
                return False
        except FileNotFoundError:
            return False
        found = self._differences_to(self.recipe_key)
        if found:
            raise RecipeError(
                f"{self.url}/{self.recipe_key} is of another recipe: " + "; ".join(found)
            )
        return True

    @property
    def url(self) -> str:
        return self.blobs.url

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[str, RecipeT]]:
        if self.url.startswith("memory:"):
            raise StoreError(
                f"{self.url} lives in one process and cannot be sent to another; set store.url to "
                "a directory or a bucket"
            )
        return type(self), (self.url, self.recipe)

    def exists(self, number: int) -> bool:
        """Whether there is an object of the name, whatever its bytes are."""
        return self.blobs.stat(self.key(number)) is not None

    def is_whole(self, number: int) -> bool:
        """Whether the object is there, and as long as it says itself; its other bytes are not
        looked at."""
        try:
            head, num_bytes = self.blobs.read_start(self.key(number), START_BYTES)
        except (FileNotFoundError, NotAFileError):
            return False
        return is_whole(head, num_bytes=num_bytes, last=self._last_tensor)

    def has_whole(self, number: int) -> bool:
        """As `is_whole`, of any number: none is there that the recipe does not have."""
        return number < self._num_objects and self.is_whole(number)

    def published(self) -> set[int]:
        """The numbers of the objects that are there, by `listing`."""
        return self.listing().published

    def listing(self) -> Listing:
        """The objects that are there. In a directory each one is opened, since it may be cut short;
        an object in a bucket is whole."""
        blobs = self.blobs.under(f"{self.folder}/{self._objects}")
        there = {number for blob in blobs if (number := self._number_of(blob.key)) is not None}
        if self.blobs.directory is None:
            return Listing(there, cut=set())
        known = {number for number in there if number < self._num_objects}
        cut = {number for number in known if not self.is_whole(number)}
        return Listing(there - cut, cut)

    def quarantine(self, number: int) -> bool:
        """Move an object into quarantine/, where no reader looks, unless it verifies. True if it
        must be published anew; False if it is good after all."""
        try:
            self.verify(number)
            return False
        except ChunkMissing:
            return True
        except ChunkError:
            self._move_aside(number)
        return True

    def delete(self, *numbers: int) -> None:
        """Delete objects that nobody needs any more; one that is gone already is no error."""
        self.blobs.delete(*map(self.key, numbers))

    def restore_recipe(self) -> bool:
        """Publish recipe.json anew if it is missing or damaged; a damaged one goes to quarantine.
        True if it had to be."""
        key, data = self.recipe_key, self.recipe.canonical_json()
        blob = self.blobs.stat(key)
        if blob is not None:
            if data in (bytes(self.blobs.read(key)), b"".join(self.blobs.pieces(key))):
                return False
            self.blobs.move(key, quarantine_key(self.folder, blob))
        self.blobs.create(key, data)
        return True

    def _move_aside(self, number: int) -> None:
        self._move_into_quarantine(self.key(number))

    def _move_into_quarantine(self, key: str) -> None:
        blob = self.blobs.stat(key)
        if blob is not None:
            with suppress(FileNotFoundError):  # another process was first
                self.blobs.move(key, quarantine_key(self.folder, blob))

    def _put(self, number: int, data: bytes) -> bool:
        """One create-only put, so it is there whole or not at all, and the first publisher wins:
        False for all others.

        A file that a power cut left in its place, empty or cut short, goes to quarantine first, as
        does anything there that is no file. Raises StoreUnavailable if another try may help,
        StoreError if it cannot.
        """
        key, created = self.key(number), False
        with suppress(NotAFileError):
            created = self.blobs.create(key, data)
        # what a power cut left is replaced; another publisher's whole object stays
        if not created and not self.is_whole(number) and self.quarantine(number):
            created = self.blobs.create(key, data)
        return created

    def _whole(self, number: int, unpack: Callable[[bytes | memoryview], Any]) -> Any:
        """A whole object, unpacked. Raises ChunkMissing if it is not there yet, ChunkError if two
        requests of two kinds find it bad."""
        key = self.key(number)
        with self._reading(number):
            try:
                return unpack(self.blobs.read(key))
            except ChunkError:  # perhaps damaged on the way alone
                again = b"".join(self.blobs.pieces(key))
        return unpack(memoryview(again))

    @contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Name the object in the error: ChunkMissing where it is absent, ChunkError where something
        else than a file is there."""
        try:
            yield
        except FileNotFoundError:
            raise ChunkMissing(
                f"{self.noun} {number} is not in {self.url}/{self.folder}: it has not been "
                "published yet"
            ) from None
        except NotAFileError as error:
            raise ChunkError(f"{self.noun} {number} is damaged: {error}") from None


def quarantine_key(folder: str, blob: Blob) -> str:
    """Where an object of a recipe's folder is moved to: its name, with the moment at which it was
    published. What lies deeper than the objects keeps the names of its folders."""
    *folders, name = blob.key.removeprefix(f"{folder}/").split("/")
    kept = folders if folders[:1] in (["verdicts"], ["graders"]) else []
    stem, dot, suffix = name.partition(".")
    moment = blob.modified.strftime("%Y%m%dT%H%M%S.%f")
    return "/".join((folder, "quarantine", *kept, f"{stem}-{moment}{dot}{suffix}"))
