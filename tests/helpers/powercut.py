"""What a power cut leaves: a layer that records every call that changes files, and what would be on
disk after any prefix of the record.

The disk keeps a file's bytes up to its last fsync. Of a directory it keeps the names of its last
fsync; of what was named, renamed and removed since, all or nothing, directory by directory, for a
file system may write them in any order.
"""

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from stillhouse.atomic import Buffer, FileLayer, SystemFiles


@dataclass(eq=False)
class _File:
    now: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class _Directory:
    now: dict[str, "_File | _Directory"] = field(default_factory=dict)
    synced: dict[str, "_File | _Directory"] = field(default_factory=dict)

    def below(self) -> "Iterator[_Directory]":
        yield self
        for node in {
            id(node): node for node in (*self.now.values(), *self.synced.values())
        }.values():
            if isinstance(node, _Directory):
                yield from node.below()


Names = Callable[[_Directory], dict[str, "_File | _Directory"]]
Call = Callable[["Disk"], None]
# paths in order, with their bytes; None for a directory
Remains = tuple[tuple[str, bytes | None], ...]


def _now_in_one(one: _Directory, directory: _Directory) -> dict[str, "_File | _Directory"]:
    return directory.now if directory is one else directory.synced


def _synced_in_one(one: _Directory, directory: _Directory) -> dict[str, "_File | _Directory"]:
    return directory.synced if directory is one else directory.now


class Disk:
    """A model of a directory on a disk: what its processes see, and what is safe."""

    def __init__(self) -> None:
        self._root = _Directory()
        self._open: dict[int, _File] = {}
        self.told: list[tuple[str, int]] = []  # what was reported up to now: (kind, number)

    def open(self, path: Path, descriptor: int) -> None:
        node = self._directory(path.parent).now.setdefault(path.name, _File())
        assert isinstance(node, _File)
        self._open[descriptor] = node

    def write(self, descriptor: int, data: bytes) -> None:
        self._open[descriptor].now += data

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        self._open[descriptor].now = self._open[descriptor].now[:num_bytes]

    def sync(self, descriptor: int) -> None:
        self._open[descriptor].synced = self._open[descriptor].now

    def sync_directory(self, path: Path) -> None:
        directory = self._directory(path)
        directory.synced = dict(directory.now)

    def name(self, path: Path, source: Path) -> None:
        self._directory(path.parent).now[path.name] = self._directory(source.parent).now[
            source.name
        ]

    def rename(self, path: Path, source: Path) -> None:
        self.name(path, source)
        self.remove(source)

    def remove(self, path: Path) -> None:
        del self._directory(path.parent).now[path.name]

    def mkdir(self, path: Path) -> None:
        self._directory(path.parent).now[path.name] = _Directory()

    def remains(self) -> set[Remains]:
        """All that a power cut at this moment may leave."""
        unsure = [
            directory for directory in self._root.below() if directory.now != directory.synced
        ]

        def removals(directory: _Directory) -> dict[str, "_File | _Directory"]:
            return {name: node for name, node in directory.synced.items() if name in directory.now}

        choices: list[Names] = [
            lambda directory: directory.synced,
            lambda directory: directory.now,
            removals,
        ]
        for one in unsure:
            choices += [partial(_now_in_one, one), partial(_synced_in_one, one)]
        return {
            tuple(sorted(_listed(self._root, names, cut)))
            for names in choices
            for cut in (False, True)
        }

    def _directory(self, path: Path) -> _Directory:
        node: _File | _Directory = self._root
        for part in path.parts:
            assert isinstance(node, _Directory)
            node = node.now[part]
        assert isinstance(node, _Directory)
        return node


class Recorder:
    """A file layer that makes every call below `root`, and keeps it. A sync that `loses` matches is
    not made: a fault to be found.

    A sync is called `file` or `directory` and a path relative to the root.
    """

    def __init__(self, root: Path, *, loses: str = "", record: list[Call] | None = None) -> None:
        self._root, self._loses = root, re.compile(loses or "$^")
        self._files: FileLayer = SystemFiles()
        self._paths: dict[int, Path] = {}
        self._lock = threading.RLock()
        self.record: list[Call] = [] if record is None else record
        self.syncs: list[str] = []

    def losing(self, pattern: str) -> "Recorder":
        """Another layer on the same record, with a fault."""
        other = Recorder(self._root, loses=pattern, record=self.record)
        other._lock = self._lock
        return other

    def tell(self, kind: str, number: int = 0) -> None:
        """Note that something was reported."""
        self._keep(lambda disk: disk.told.append((kind, number)))

    def open(self, path: Path, flags: int, mode: int) -> int:
        with self._lock:
            descriptor, inside = self._files.open(path, flags, mode), self._inside(path)
            self._paths[descriptor] = inside
            self._keep(lambda disk: disk.open(inside, descriptor))
            return descriptor

    def write(self, descriptor: int, data: Buffer) -> None:
        with self._lock:
            self._files.write(descriptor, data)
            whole = bytes(data)
            self._keep(lambda disk: disk.write(descriptor, whole))

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        with self._lock:
            self._files.truncate(descriptor, num_bytes)
            self._keep(lambda disk: disk.truncate(descriptor, num_bytes))

    def sync(self, descriptor: int) -> None:
        self._sync(f"file {self._paths[descriptor]}", lambda disk: disk.sync(descriptor))

    def sync_directory(self, path: Path) -> None:
        inside = self._inside(path)
        self._sync(f"directory {inside}", lambda disk: disk.sync_directory(inside))

    def link(self, source: Path, destination: Path) -> None:
        before, after = self._inside(source), self._inside(destination)
        with self._lock:
            self._files.link(source, destination)
            self._keep(lambda disk: disk.name(after, before))

    def rename(self, source: Path, destination: Path) -> None:
        before, after = self._inside(source), self._inside(destination)
        with self._lock:
            self._files.rename(source, destination)
            self._keep(lambda disk: disk.rename(after, before))

    def unlink(self, path: Path) -> None:
        inside = self._inside(path)
        with self._lock:
            self._files.unlink(path)
            self._keep(lambda disk: disk.remove(inside))

    def mkdir(self, path: Path, mode: int) -> None:
        inside = self._inside(path)
        with self._lock:
            self._files.mkdir(path, mode)
            self._keep(lambda disk: disk.mkdir(inside))

    def rmdir(self, path: Path) -> None:
        inside = self._inside(path)
        with self._lock:
            self._files.rmdir(path)
            self._keep(lambda disk: disk.remove(inside))

    def _sync(self, name: str, call: Call) -> None:
        with self._lock:
            self.syncs.append(name)
            if not self._loses.fullmatch(name):
                self._keep(call)

    def _keep(self, call: Call) -> None:
        with self._lock:
            self.record.append(call)

    def _inside(self, path: Path) -> Path:
        return path.relative_to(self._root)


def power_cuts(record: Iterable[Call]) -> Iterator[tuple[Remains, list[tuple[str, int]]]]:
    """For every prefix of the record, all that may be left, each with what had been reported; what
    is the same as before is left out."""
    disk, seen = Disk(), set()
    for call in record:
        call(disk)
        for remains in disk.remains():
            if (remains, len(disk.told)) not in seen:
                seen.add((remains, len(disk.told)))
                yield remains, list(disk.told)


class Unsynced(SystemFiles):
    """The calls without the syncs, for a directory whose fate is of no interest."""

    def sync(self, descriptor: int) -> None: ...

    def sync_directory(self, path: Path) -> None: ...


class After:
    """A directory that becomes what one power cut after the other leaves; only what differs from
    the last one is written."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self._there: dict[str, bytes | None] = {}

    def becomes(self, remains: Remains) -> None:
        wanted = dict(remains)
        for path in sorted(self._there.keys() - wanted.keys(), reverse=True):
            (self.root / path).rmdir() if self._there[path] is None else (self.root / path).unlink()
        for path, data in remains:
            if data is None and path not in self._there:
                os.mkdir(self.root / path)
            elif data is not None and self._there.get(path) != data:
                (self.root / path).write_bytes(data)
        self._there = wanted

    def clear(self) -> None:
        """After something else was written here."""
        shutil.rmtree(self.root)
        self.root.mkdir()
        self._there = {}


def _listed(
    directory: _Directory, names: Names, cut: bool, prefix: str = ""
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in names(directory).items():
        if isinstance(node, _Directory):
            yield prefix + name, None
            yield from _listed(node, names, cut, f"{prefix}{name}/")
        else:
            yield prefix + name, _half_way(node) if cut else node.synced


def _half_way(file: _File) -> bytes:
    """The bytes that are safe, and half of those that came since."""
    if not file.now.startswith(file.synced):
        return file.synced
    return file.now[: (len(file.synced) + len(file.now)) // 2]
