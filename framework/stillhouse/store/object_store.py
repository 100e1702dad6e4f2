"""Bytes under keys, in a directory or an object store: what is there is whole, what is created
stays, and every failure is a StoreError."""

import functools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from stillhouse.atomic import DISK, FileLayer
from stillhouse.errors import StoreError, StoreUnavailable
from stillhouse.store.download import RANGE_BYTES, Answer, download
from stillhouse.store.explain import explain, is_past_the_end, says_absent
from stillhouse.store.folder import Folder

if TYPE_CHECKING:
    from obstore.store import BackoffConfig, ClientConfig, RetryConfig

_REMOTE = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
_CREATE_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.05
_MERGE_BYTES = 256 << 10  # reading on over a gap of this size costs less than asking once more
# of a streamed object: S3 takes 10,000 parts, so up to 312 GB
_PART_BYTES, _PARTS_IN_FLIGHT = (
    32 << 20,
    4,
)
# at one time; more stays in no cache, and keeps other threads waiting for the interpreter
_STREAM_BYTES = 2 << 20
# of a download: what came is kept in pieces of this size where a request breaks off
_PIECE_BYTES = 256 << 10
# obstore has a limit on a whole answer, of 30 s unless it is told another
_NO_LIMIT = timedelta(days=30)


class NotAFileError(StoreError):
    """Something else is in the place of an object in a directory: a named pipe, a device, a
    directory, a link into nothing."""


class Blob(NamedTuple):
    key: str
    num_bytes: int
    modified: datetime


class ObjectLayer(Protocol):
    """The requests to an object store: the functions of `obstore` of these names. They take, return
    and raise what those do."""

    def put(
        self, store: Any, path: str, file: Any, *, mode: Any = ..., use_multipart: bool | None = ...
    ) -> Any: ...

    def open_writer(
        self, store: Any, path: str, *, buffer_size: int = ..., max_concurrency: int = ...
    ) -> Any: ...

    def head(self, store: Any, path: str) -> Any: ...

    def get(self, store: Any, path: str, *, options: Any = ...) -> Any: ...

    def get_ranges(
        self, store: Any, path: str, *, starts: Any, ends: Any, coalesce: int = ...
    ) -> Any: ...

    def list(self, store: Any, prefix: str | None = ..., *, chunk_size: int = ...) -> Any: ...

    def list_with_delimiter(self, store: Any, prefix: str | None = ...) -> Any: ...

    def delete(self, store: Any, paths: Any) -> None: ...

    def rename(self, store: Any, from_: str, to: str) -> None: ...


OBSTORE = cast("ObjectLayer", obstore)  # a module: its functions are these


class Blobs:
    """The objects under one root. Safe to use from several threads; opened at the first use, so it
    costs nothing to make.

    What has been written to a directory when a call returns survives a power cut. A bucket's
    provider sees to that itself.
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

        A store that refuses or is busy is asked again for `patience_s`; one that falls silent is
        given up after twice as long. An answer may take any time, as long as it goes on coming.
        `pause` waits between two tries to create the same object.
        """
        self.url = _absolute(url)
        self._patience_s = patience_s
        self.directory = None if "://" in self.url else Path(self.url)
        self._files, self._objects, self._pause = files, objects, pause

    @functools.cached_property
    def _folder(self) -> Folder | None:
        """What writes into a directory; None where the root is none."""
        return None if self.directory is None else Folder(self.directory, files=self._files)

    @functools.cached_property
    def _store(self) -> ObjectStore:
        with self._in_words("open the store"):
            if self.directory is not None:
                return LocalStore(self.directory, mkdir=True)
            if self.url.startswith("memory:"):
                return _process_memory(self.url)
            return from_url(
                self.url, client_options=self._client_config(), retry_config=self._retry_config()
            )

    def create(self, key: str, data: bytes) -> bool:
        """Put a new object, whole or not at all. False if there is one already, which stays as it
        is.

        Raises NotAFileError if what is there is no file.
        """
        if key.startswith("/") or ".." in key.split("/"):
            raise StoreError(
                f"the key {key} leads out of {self.url}; wanted a relative one, without '..'"
            )
        if self._folder is not None:
            with self._in_words(f"write {key}", absence_is_told=False):
                try:
                    return self._folder.create(key, data)
                except FileExistsError as error:
                    raise NotAFileError(
                        str(explain(error, doing=f"write {key}", url=self.url))
                    ) from error
        for attempt in range(_CREATE_ATTEMPTS):
            with self._in_words(f"write {key}"):
                try:
                    self._objects.put(self._store, key, data, mode="create", use_multipart=False)
                    return True
                except AlreadyExistsError:
                    pass
                except FileNotFoundError as error:
                    raise explain(error, doing=f"write {key}", url=self.url) from error
            if self.stat(key) is not None:
                return False
            # S3 answered 409: two writers at once, of whom perhaps neither has won
            self._pause(_FIRST_PAUSE_S * 2**attempt)
        raise StoreUnavailable(
            f"cannot write {key} in {self.url}: the store says that it exists, and that it does "
            "not; try again"
        )

    def replace(self, key: str, data: bytes) -> None:
        """Put an object, whole or not at all, in place of what is there."""
        if self._folder is not None:
            with self._in_words(f"write {key}", absence_is_told=False):
                self._folder.replace(key, data)
            return
        with self._in_words(f"write {key}"):
            self._objects.put(self._store, key, data, use_multipart=False)

    def stream(
        self, key: str, fill: Callable[[Callable[[bytes | memoryview], None]], None]
    ) -> None:
        """Put an object of any size, whole or not at all, in place of what is there: `fill` is
        called with a function that takes its bytes.

        Holds at most 160 MiB at one time. What `fill` raises leaves the key as it was.
        """
        if self._folder is not None:
            self._stream_to_folder(self._folder, key, fill)
            return
        with self._in_words(f"write {key}"):
            out = self._objects.open_writer(
                self._store, key, buffer_size=_PART_BYTES, max_concurrency=_PARTS_IN_FLIGHT
            )

        def write(data: bytes | memoryview) -> None:
            with self._in_words(f"write {key}"), memoryview(data) as whole:
                for start in range(0, len(whole), _STREAM_BYTES):
                    # obstore reads it after this returns: its owner may change it
                    out.write(bytes(whole[start : start + _STREAM_BYTES]))

        try:
            fill(write)
        except BaseException as error:
            with suppress(BaseError, OSError, ValueError):
                out.__exit__(type(error), error, error.__traceback__)
            raise
        with self._in_words(f"write {key}"):
            out.close()

    def _stream_to_folder(
        self, folder: Folder, key: str, fill: Callable[[Callable[[bytes | memoryview], None]], None]
    ) -> None:
        in_words = functools.partial(self._in_words, f"write {key}", absence_is_told=False)
        with in_words():
            staging = folder.staging(key)

        def write(data: bytes | memoryview) -> None:
            with in_words():
                staging.write(data)

        with staging:
            fill(write)
            with in_words():
                staging.replace()

    def stat(self, key: str) -> Blob | None:
        """Size and time of an object, or of what is in its place in a directory; None if nothing is
        there."""
        try:
            with self._in_words(f"look for {key}"):
                if (
                    self.directory is not None
                ):  # obstore would open it, and a named pipe never opens
                    return _stat_file(self.directory / key, key)
                meta = self._objects.head(self._store, key)
        except FileNotFoundError:
            return None
        return Blob(key, meta["size"], meta["last_modified"])

    def _require_file(self, key: str) -> None:
        """Raise NotAFileError where something else is in its place: to open a named pipe might
        never end."""
        if self.directory is None:
            return
        path = self.directory / key
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            if path.is_symlink():
                raise NotAFileError(f"{path} is a link to nothing") from None
            raise
        if not stat.S_ISREG(mode):
            raise NotAFileError(f"{path} is no file")

    def read(self, key: str) -> memoryview:
        """A whole object. Raises FileNotFoundError if there is none; as all reads do, NotAFileError
        if something else is there."""
        with self._in_words(f"read {key}"):
            self._require_file(key)
            return memoryview(self._objects.get(self._store, key).bytes())

    def pieces(self, key: str, *, range_bytes: int = RANGE_BYTES) -> Iterator[memoryview]:
        """A whole object of any size, some MiB at a time at most. Raises FileNotFoundError if there
        is none.

        From an object store it comes by ranges of `range_bytes`, as `download` says. A second read
        with another `range_bytes` sends other requests, so that a caching proxy cannot answer it
        with what it answered to the first.
        """
        if self.directory is None:
            yield from download(functools.partial(self._open_range, key), range_bytes=range_bytes)
            return
        with self._in_words(f"read {key}"):
            self._require_file(key)
            with (self.directory / key).open(
                "rb"
            ) as file:  # obstore's own stream is thirty times slower
                while piece := file.read(_STREAM_BYTES):
                    yield memoryview(piece)

    def _open_range(self, key: str, start: int, end: int) -> Answer:
        doing = f"read the bytes from {start} to {end} of {key}"

        def body() -> Iterator[memoryview]:
            with self._in_words(doing):
                for piece in answer.stream(min_chunk_size=_PIECE_BYTES):
                    yield memoryview(piece)

        with self._in_words(doing):
            try:
                answer = self._objects.get(self._store, key, options={"range": (start, end)})
            except BaseError as error:
                if start == 0 and is_past_the_end(error):  # it has no byte
                    return Answer(0, ())
                raise
        return Answer(answer.meta["size"], body())

    def read_start(self, key: str, num_bytes: int) -> tuple[memoryview, int]:
        """The first `num_bytes` of an object, or all that it has, and its size: one request. Raises
        FileNotFoundError if there is none."""
        with self._in_words(f"read the start of {key}"):
            self._require_file(key)
            if (
                self.directory is not None
            ):  # obstore's way takes several times as long, and a listing does this for every chunk
                with (self.directory / key).open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    return memoryview(
                        file.read(min(num_bytes, size))
                    ), size  # memory is taken for all that is asked for
            try:
                answer = self._objects.get(self._store, key, options={"range": (0, num_bytes)})
                return memoryview(answer.bytes()), answer.meta["size"]
            except BaseError as error:
                if is_past_the_end(error):  # even the first byte is
                    return memoryview(b""), 0
                raise

    def read_extents(self, key: str, extents: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes start .. end of each extent, in the order asked; shorter where the object ends
        first. Near ones share a request.

        All are empty if one begins after the object's end. Raises FileNotFoundError if there is no
        such object.
        """
        spans = _merge(extents)
        with self._in_words(f"read {len(spans)} ranges of {key}"):
            self._require_file(key)
            try:
                starts, ends = [start for start, _ in spans], [end for _, end in spans]
                found = (
                    self._objects.get_ranges(self._store, key, starts=starts, ends=ends, coalesce=0)
                    if spans
                    else []
                )
            except BaseError as error:
                if not is_past_the_end(error):
                    raise
                found = []
        pieces = {span: memoryview(piece) for span, piece in zip(spans, found, strict=False)}
        return [_cut(pieces, start, end) for start, end in extents]

    def under(self, prefix: str) -> Iterator[Blob]:
        """The objects whose keys begin with `prefix` and a slash, in the order of their keys."""
        with self._in_words(f"list {prefix}"):
            batches = list(self._objects.list(self._store, prefix, chunk_size=1000))
        blobs = (
            Blob(meta["path"], meta["size"], meta["last_modified"])
            for batch in batches
            for meta in batch
        )
        return iter(sorted(blobs))

    def folders(self) -> list[str]:
        """The first parts of all keys, sorted. A directory that does not exist has none, and is not
        made."""
        if self.directory is not None and not self.directory.is_dir():
            return []
        with self._in_words("list the store"):
            return sorted(self._objects.list_with_delimiter(self._store)["common_prefixes"])

    def names(self) -> list[str]:
        """The keys without a slash, sorted. A directory that does not exist has none, and is not
        made."""
        if self.directory is not None and not self.directory.is_dir():
            return []
        with self._in_words("list the store"):
            return sorted(
                meta["path"] for meta in self._objects.list_with_delimiter(self._store)["objects"]
            )

    def delete(self, *keys: str) -> None:
        """Delete objects, for good; one that is gone already is no error."""
        with self._in_words(f"delete {', '.join(keys[:3])}"):
            if self._folder is not None:
                self._folder.delete(*keys)
                return
            for key in keys:
                with suppress(FileNotFoundError):
                    self._objects.delete(self._store, key)

    def delete_under(self, prefix: str) -> None:
        """Delete all objects whose keys begin with `prefix` and a slash, and what killed writers
        left of others."""
        if self._folder is not None:
            self._folder.delete_under(prefix)
            return
        keys = [blob.key for blob in self.under(prefix)]
        with self._in_words(f"delete {prefix}"):
            self._objects.delete(self._store, keys)

    def move(self, source: str, destination: str) -> None:
        """Give an object another key. Raises FileNotFoundError if there is none."""
        with self._in_words(f"move {source} to {destination}"):
            if self._folder is not None:
                self._folder.move(source, destination)
            else:
                self._objects.rename(self._store, source, destination)

    def sync(self, prefix: str) -> None:
        """Return when nothing under `prefix`, whoever wrote it, can be lost with the power: before
        an object that refers to it is put."""
        if self._folder is not None:
            with self._in_words(f"sync {prefix}"):
                self._folder.sync(prefix)

    def _client_config(self) -> "ClientConfig":
        # These replace all client options of the environment, AWS_ALLOW_HTTP among them; an
        # endpoint says http or https itself.
        silence = timedelta(seconds=2 * self._patience_s)
        return {
            "connect_timeout": "5s",
            "read_timeout": silence,
            "timeout": _NO_LIMIT,
            "allow_http": True,
        }

    def _retry_config(self) -> "RetryConfig":
        backoff: BackoffConfig = {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        }
        return {
            "max_retries": 1000,
            "retry_timeout": timedelta(seconds=self._patience_s),
            "backoff": backoff,
        }

    @contextmanager
    def _in_words(self, doing: str, *, absence_is_told: bool = True) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            if absence_is_told and says_absent(error):
                raise
            raise explain(error, doing=doing, url=self.url) from error


def _stat_file(path: Path, key: str) -> Blob:
    """Of the file that a link leads to, or of the link where it leads to none. Raises
    FileNotFoundError where neither is there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        found = path.lstat()
    return Blob(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


def _absolute(url: str) -> str:
    """A directory as an absolute path, so that it means the same in every process; any other URL
    without a slash at its end."""
    if "://" not in url:
        if not url:
            raise StoreError(
                "the store's URL is empty; set store.url to a directory, or to s3://, gs:// or "
                "az:// with bucket and prefix"
            )
        return str(Path(url).absolute())
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise StoreError(
                f"the store's URL is {url}: write file:/// with an absolute path, or the path alone"
            )
        return str(Path(unquote(parts.path)))
    if parts.scheme not in (*_REMOTE, "memory") or ".." in parts.path.split("/"):
        raise StoreError(
            f"the store's URL is {url}: wanted a directory, or s3://, gs:// or az:// with bucket "
            "and prefix"
        )
    return url.rstrip("/") if parts.scheme != "memory" else url


@functools.cache
def _process_memory(_url: str) -> MemoryStore:
    """What memory:// means: the same URL is the same store, within one process."""
    return MemoryStore()


def _merge(extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that cover all extents that are not empty, in order and apart from one another.

    Merged here, not by obstore: its own merging panics when the object is shorter than the reader
    believes.
    """
    spans: list[tuple[int, int]] = []
    for start, end in sorted(extent for extent in extents if extent[0] < extent[1]):
        if spans and start <= spans[-1][1] + _MERGE_BYTES:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def _cut(pieces: dict[tuple[int, int], memoryview], start: int, end: int) -> memoryview:
    for (first, last), piece in pieces.items():
        if first <= start and end <= last:
            return piece[start - first : end - first]
    return memoryview(b"")
