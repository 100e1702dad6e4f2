"""Bytes under keys, in a directory or an object store: an object is whole or absent, a created one
stays, and every failure is a StoreError."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore

from stillhouse.atomic import DISK, FileLayer
from stillhouse.errors import StoreError, StoreUnavailable
from stillhouse.retry import pauses
from stillhouse.store.download import RANGE_BYTES, Answer, download
from stillhouse.store.explain import explained, is_past_the_end
from stillhouse.store.folder import Folder
from stillhouse.store.local_file import pieces_of, require_file, size_and_time, start_of
from stillhouse.store.multipart import MultipartUpload
from stillhouse.store.object_layer import OBSTORE, ObjectLayer, open_store
from stillhouse.store.ranges import Extent, cut, merged
from stillhouse.store.url import absolute_url

_CREATE_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.05
# of a download: what has arrived is kept in pieces of this size where an answer breaks off
_PIECE_BYTES = 256 << 10

Write = Callable[[bytes | memoryview], None]


class Blob(NamedTuple):
    """What a listing says of an object."""

    key: str
    num_bytes: int
    modified: datetime


class Blobs:
    """The objects under one root, a directory or a bucket's prefix. Safe to share among threads;
    opened at the first use.

    Durability: what a call has written to a directory survives a power cut once the call has
    returned. A bucket's provider is responsible for its own.
    """

    def __init__(
        self,
        url: str,
        *,
        patience_s: float = 30.0,
        files: FileLayer = DISK,
        objects: ObjectLayer = OBSTORE,
        pause: Callable[[float], None] = sleep,
    ) -> None:
        """`url`: a directory, file://, s3://, gs://, az:// or memory:// (one process only). Raises
        StoreError on any other.

        `patience_s`: for how long one request is tried again; see `open_store`. `pause` waits
        between two tries to create the same object.
        """
        self.url = absolute_url(url)
        self.directory = None if "://" in self.url else Path(self.url)
        self._patience_s = patience_s
        self._files, self._objects, self._pause = files, objects, pause

    @functools.cached_property
    def _folder(self) -> Folder | None:
        """The writer into a directory; None where the root is an object store."""
        return None if self.directory is None else Folder(self.directory, files=self._files)

    @functools.cached_property
    def _store(self) -> ObjectStore:
        with explained("open the store", url=self.url):
            return open_store(self.url, patience_s=self._patience_s)

    def create(self, key: str, data: bytes) -> bool:
        """Put a new object, whole or not at all. False if there is one already, which stays as it
        is.

        Raises NotAFileError if something else than a file is there.
        """
        if key.startswith("/") or ".." in key.split("/"):
            raise StoreError(
                f"the key {key} leads out of {self.url}; wanted a relative one, without '..'"
            )
        # a directory
        if self._folder is not None:
            with self._writing(key):
                return self._folder.create(key, data)
        # an object store
        pauses_s = pauses(_FIRST_PAUSE_S, last_s=1.0)
        for _ in range(_CREATE_ATTEMPTS):
            with self._writing(key), suppress(AlreadyExistsError):
                self._objects.put(self._store, key, data, mode="create", use_multipart=False)
                return True
            if self.stat(key) is not None:
                return False
            # S3 answers 409 to two writers at once, and it may be that neither of them has won
            self._pause(next(pauses_s))
        raise StoreUnavailable(
            f"cannot write {key} in {self.url}: the store says that it exists, and that it does "
            "not; try again"
        )

    def replace(self, key: str, data: bytes) -> None:
        """Put an object, whole or not at all, in place of what is there."""
        with self._writing(key):
            if self._folder is not None:
                self._folder.replace(key, data)
            else:
                self._objects.put(self._store, key, data, use_multipart=False)

    def stream(self, key: str, fill: Callable[[Write], None]) -> None:
        """Put an object of any size, whole or not at all, in place of what is there: `fill` is
        called with a function that takes its bytes.

        Memory is bounded, see `MultipartUpload`. What `fill` raises leaves the key as it was.
        """
        with self._writing(key):
            upload = (
                MultipartUpload(self._objects, self._store, key)
                if self._folder is None
                else self._folder.staging(key)
            )

        def write(data: bytes | memoryview) -> None:
            with self._writing(key):
                upload.write(data)

        with upload:
            fill(write)
            with self._writing(key):
                upload.replace()

    def stat(self, key: str) -> Blob | None:
        """Size and time of an object, or of what is in its place in a directory; None if nothing is
        there."""
        try:
            with explained(f"look for {key}", url=self.url):
                if self.directory is not None:  # obstore would open a named pipe, and hang
                    return Blob(key, *size_and_time(self.directory / key))
                meta = self._objects.head(self._store, key)
        except FileNotFoundError:
            return None
        return Blob(key, meta["size"], meta["last_modified"])

    def read(self, key: str) -> memoryview:
        """A whole object. Raises FileNotFoundError if there is none, and NotAFileError if something
        else is there; so do all reads."""
        with self._reading(key, f"read {key}"):
            return memoryview(self._objects.get(self._store, key).bytes())

    def pieces(self, key: str, *, range_bytes: int = RANGE_BYTES) -> Iterator[memoryview]:
        """A whole object of any size, at most some MiB at a time.

        From an object store it is read by ranges of `range_bytes`, see `download`. A second read
        with another `range_bytes` sends other requests, so that a caching proxy cannot answer it
        with what it answered to the first.
        """
        if self.directory is None:
            yield from download(functools.partial(self._open_range, key), range_bytes=range_bytes)
            return
        with self._reading(key, f"read {key}"):
            yield from pieces_of(self.directory / key)

    def read_start(self, key: str, num_bytes: int) -> tuple[memoryview, int]:
        """The first `num_bytes` of an object, or all that it has, and its size: one request."""
        with self._reading(key, f"read the start of {key}"):
            if self.directory is not None:
                return start_of(self.directory / key, num_bytes)
            try:
                answer = self._objects.get(self._store, key, options={"range": (0, num_bytes)})
                return memoryview(answer.bytes()), answer.meta["size"]
            except BaseError as error:
                if is_past_the_end(error):  # the object has no byte
                    return memoryview(b""), 0
                raise

    def read_extents(self, key: str, extents: Sequence[Extent]) -> list[memoryview]:
        """The bytes start .. end of each extent, in the order of `extents`; shorter where the
        object ends first. Near ones share a request.

        All are empty if one begins after the object's end.
        """
        spans = merged(extents)
        with self._reading(key, f"read {len(spans)} ranges of {key}"):
            try:
                found = self._get_ranges(key, spans) if spans else []
            except BaseError as error:
                if not is_past_the_end(error):
                    raise
                found = []
        pieces = {span: memoryview(piece) for span, piece in zip(spans, found, strict=False)}
        return [cut(pieces, extent) for extent in extents]

    def under(self, prefix: str) -> Iterator[Blob]:
        """The objects whose keys begin with `prefix` and a slash, in the order of their keys."""
        with explained(f"list {prefix}", url=self.url):
            batches = list(self._objects.list(self._store, prefix, chunk_size=1000))
        metas = (meta for batch in batches for meta in batch)
        return iter(
            sorted(Blob(meta["path"], meta["size"], meta["last_modified"]) for meta in metas)
        )

    def folders(self, under: str = "") -> list[str]:
        """The first parts of all keys, sorted; of those under a folder, what follows it, too. An
        absent directory has none, and is not made."""
        return sorted(self._list_level(under)["common_prefixes"])

    def names(self) -> list[str]:
        """The keys without a slash, sorted. An absent directory has none, and is not made."""
        return sorted(meta["path"] for meta in self._list_level("")["objects"])

    def delete(self, *keys: str) -> None:
        """Delete objects, for good; one that is gone already is no error."""
        with explained(f"delete {', '.join(keys[:3])}", url=self.url):
            if self._folder is not None:
                self._folder.delete(*keys)
                return
            for key in keys:
                with suppress(FileNotFoundError):
                    self._objects.delete(self._store, key)

    def delete_under(self, prefix: str) -> None:
        """Delete all objects whose keys begin with `prefix` and a slash, and what killed writers
        left there."""
        if self._folder is not None:
            self._folder.delete_under(prefix)
            return
        keys = [blob.key for blob in self.under(prefix)]
        with explained(f"delete {prefix}", url=self.url):
            self._objects.delete(self._store, keys)

    def move(self, source: str, destination: str) -> None:
        """Give an object another key. Raises FileNotFoundError if there is none."""
        with explained(f"move {source} to {destination}", url=self.url):
            if self._folder is not None:
                self._folder.move(source, destination)
            else:
                self._objects.rename(self._store, source, destination)

    def sync(self, prefix: str) -> None:
        """Return when no object under `prefix`, by any writer, can be lost in a power cut; called
        before an object that refers to them is put."""
        if self._folder is not None:
            with explained(f"sync {prefix}", url=self.url):
                self._folder.sync(prefix)

    @contextmanager
    def _reading(self, key: str, doing: str) -> Iterator[None]:
        with explained(doing, url=self.url):
            if self.directory is not None:
                require_file(self.directory / key)
            yield

    def _open_range(self, key: str, start: int, end: int) -> Answer:
        doing = f"read the bytes from {start} to {end} of {key}"

        def body() -> Iterator[memoryview]:
            with explained(doing, url=self.url):
                for piece in answer.stream(min_chunk_size=_PIECE_BYTES):
                    yield memoryview(piece)

        with explained(doing, url=self.url):
            try:
                answer = self._objects.get(self._store, key, options={"range": (start, end)})
            except BaseError as error:
                if start == 0 and is_past_the_end(error):  # the object has no byte
                    return Answer(0, ())
                raise
        return Answer(answer.meta["size"], body())

    def _get_ranges(self, key: str, spans: Sequence[Extent]) -> Any:
        starts, ends = zip(*spans, strict=True)
        return self._objects.get_ranges(self._store, key, starts=starts, ends=ends, coalesce=0)

    def _list_level(self, folder: str) -> Any:
        with explained(f"list {folder or 'the store'}", url=self.url):
            if self.directory is not None and not (self.directory / folder).is_dir():
                return {"common_prefixes": [], "objects": []}
            return self._objects.list_with_delimiter(self._store, folder or None)

    def _writing(self, key: str) -> AbstractContextManager[None]:
        """For a write, to which an absent object is no answer: the bucket or directory is
        missing."""
        return explained(f"write {key}", url=self.url, absence_passes=False)
