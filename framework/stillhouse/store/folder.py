"""Writing to a store in a local directory: keys are paths, and what has been written survives a
power cut (fsync of each file, then of its directory)."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stillhouse import atomic
from stillhouse.atomic import FileLayer, Staging
from stillhouse.errors import StoreError

_Answer = TypeVar("_Answer")

_PLAIN = re.compile(r"(?!\.\.?(/|$))[^/\0]+(/(?!\.\.?(/|$))[^/\0]+)*")
_STAGING = re.compile(r".*#\d+")


class Folder:
    """Files below one directory, by key; the first write makes the directory. Safe to share among
    threads and processes. Raises OSError, as the system does."""

    def __init__(self, root: Path, *, files: FileLayer) -> None:
        self._root, self._files = root, files
        self._synced: set[Path] = set()  # directories whose names are on disk

    def create(self, key: str, data: bytes) -> bool:
        """As `atomic.create`, and once more where a sweep removed the staging file."""
        path = self._path(key)
        return self._in_its_directory(path, lambda: atomic.create(path, data, files=self._files))

    def replace(self, key: str, data: bytes) -> None:
        """As `atomic.replace`, and once more as in `create`."""
        path = self._path(key)
        self._in_its_directory(path, lambda: atomic.replace(path, data, files=self._files))

    def staging(self, key: str) -> Staging:
        """A file for an object of any size, which is written before it has its key."""
        path = self._path(key)
        return self._in_its_directory(path, lambda: Staging(path, files=self._files))

    def delete(self, *keys: str) -> None:
        """Delete objects; one that is gone already is no error. They stay deleted."""
        atomic.unlink([self._path(key) for key in keys], files=self._files)

    def delete_under(self, prefix: str) -> None:
        """Delete a folder, with what killed writers left in it. Some of its files may be back after
        a power cut."""
        atomic.remove_tree(self._path(prefix), files=self._files)

    def move(self, source: str, destination: str) -> None:
        """As `atomic.move`, and once more as in `create`."""
        before, after = self._path(source), self._path(destination)
        self._in_its_directory(after, lambda: atomic.move(before, after, files=self._files))

    def sync(self, prefix: str) -> None:
        """Return when the names in a folder are on disk, also those of other processes' files, and
        the folder's own name."""
        self._files.sync_directory(self._path(prefix))
        self._files.sync_directory(self._path(prefix).parent)

    def _path(self, key: str) -> Path:
        if not _PLAIN.fullmatch(key) or _STAGING.fullmatch(key):
            raise StoreError(
                f"the key {key} leads out of {self._root}, or is none; wanted a relative one, "
                "without '..' and without '#1' at its end"
            )
        return self._root / key

    def _in_its_directory(self, path: Path, act: Callable[[], _Answer]) -> _Answer:
        """Act once the file's directory is there; again where another process removed the
        directory, or the staging file, meanwhile."""
        self._make(path.parent)
        try:
            return act()
        except FileNotFoundError:
            self._synced.clear()
            self._make(path.parent)
            return act()

    def _make(self, directory: Path) -> None:
        """Make sure that a directory is there and that its name is on disk: another process may
        have made it and not have synced it yet."""
        if directory in self._synced:
            return
        if directory != self._root:
            self._make(directory.parent)
        atomic.make_directory(directory, files=self._files)
        self._synced.add(directory)
