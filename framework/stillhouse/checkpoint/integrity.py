"""Whether the files of a commit are what was committed, by size and checksum (xxh3): verified in
place in a directory, or as they are downloaded from an object store.

A file is damaged where two reads, with different requests, both find it so.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import xxhash

from stillhouse.checkpoint.manifest import Commit
from stillhouse.errors import CheckpointError, StoreError, StoreUnavailable
from stillhouse.store.download import RANGE_BYTES
from stillhouse.store.object_store import Blobs

_RANGE_BYTES_OF_TWO_READS = (RANGE_BYTES, RANGE_BYTES - (1 << 20))


class Digest:
    """Size and xxh3 of bytes that come in pieces."""

    def __init__(self) -> None:
        self._hasher, self._size = xxhash.xxh3_64(), 0

    def add(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)
        self._size += len(data)

    @property
    def value(self) -> tuple[int, str]:
        return self._size, self._hasher.hexdigest()


def local_folder(blobs: Blobs, commit: Commit, scratch: Path) -> Path:
    """The folder in which `fetch` leaves the files of a commit."""
    return (blobs.directory or scratch) / commit.folder


def verify(blobs: Blobs, commit: Commit, names: Iterable[str]) -> str:
    """The problem with one of these files of a commit, or ''."""
    return _first_problem(blobs, commit, names, folder=None)


def fetch(blobs: Blobs, commit: Commit, names: Iterable[str], *, into: Path) -> str:
    """Verify these files of a commit, and download them into `local_folder` where they are in an
    object store. The problem with one of them, or ''.

    Raises CheckpointError where they cannot be written.
    """
    if blobs.directory is not None:
        return verify(blobs, commit, names)
    folder = local_folder(blobs, commit, into)
    with _explained_if_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return _first_problem(blobs, commit, names, folder=folder)


def _first_problem(
    blobs: Blobs, commit: Commit, names: Iterable[str], *, folder: Path | None
) -> str:
    for name in names:
        problem = ""
        for range_bytes in _RANGE_BYTES_OF_TWO_READS:
            problem = _problem_of_one_read(
                blobs, commit, name, range_bytes=range_bytes, folder=folder
            )
            if not problem:
                break
        if problem:
            return problem
    return ""


def _problem_of_one_read(
    blobs: Blobs, commit: Commit, name: str, *, range_bytes: int, folder: Path | None
) -> str:
    digest = Digest()
    try:
        with (folder / name).open("wb") if folder is not None else nullcontext() as file:
            for piece in blobs.pieces(f"{commit.folder}/{name}", range_bytes=range_bytes):
                digest.add(piece)
                if file is not None:
                    with _explained_if_full(folder):
                        file.write(piece)
    except FileNotFoundError:
        return f"{name} is missing"
    except StoreError as error:
        # a bucket may refuse to read a sound file; a disk that cannot read it has lost it
        if blobs.directory is None or isinstance(error, StoreUnavailable):
            raise
        return f"{name} cannot be read ({error})"
    is_as_committed = digest.value == commit.files[name]
    return "" if is_as_committed else f"{name} is not what was committed (size or checksum differs)"


@contextmanager
def _explained_if_full(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {folder}: {error.strerror}; make room for the checkpoint there, or "
            "set TMPDIR to a larger disk"
        ) from None
