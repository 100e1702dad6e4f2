"""Atomic local files: a file is there whole or not at all, and survives a power cut once the call
that wrote it has returned.

The bytes go to a staging file, `NAME#1` or the next free number, which is renamed once they are on
disk (fsync). The directory is fsynced last: only then is the name on disk, too. A writer that is
killed leaves a staging file behind, and nothing else.

All system calls go through a `FileLayer`, so that a test can record them and show what a power cut
at any of them would leave.
"""

import errno
import fcntl
import glob
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Protocol, Self

Buffer = bytes | memoryview

_MODE = 0o666  # less what the process's umask forbids
# Errors of a directory that cannot be synced: its file system has no such call or is read-only, or
# this process may write into it and not open it.
_CANNOT_SYNC_DIRECTORY = (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EACCES)


class FileLayer(Protocol):
    """The system calls that decide what is on disk after a power cut. They raise what the functions
    of `os` raise."""

    def open(self, path: Path, flags: int, mode: int) -> int: ...

    def write(self, descriptor: int, data: Buffer) -> None:
        """Write all of it."""
        ...

    def truncate(self, descriptor: int, num_bytes: int) -> None: ...

    def sync(self, descriptor: int) -> None:
        """Return when the file's bytes are on disk. Its name may not be yet."""
        ...

    def sync_directory(self, path: Path) -> None:
        """Return when the names in a directory are on disk, if its file system can promise it."""
        ...

    def link(self, source: Path, destination: Path) -> None: ...

    def rename(self, source: Path, destination: Path) -> None: ...

    def unlink(self, path: Path) -> None: ...

    def mkdir(self, path: Path, mode: int) -> None: ...

    def rmdir(self, path: Path) -> None: ...


class SystemFiles:
    """The system's own calls."""

    def open(self, path: Path, flags: int, mode: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def write(self, descriptor: int, data: Buffer) -> None:
        with memoryview(data) as whole, whole.cast("B") as left:
            start = 0
            while start < len(left):
                start += os.write(descriptor, left[start:])

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        os.ftruncate(descriptor, num_bytes)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def sync_directory(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _CANNOT_SYNC_DIRECTORY:
                return
            raise
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC_DIRECTORY:
                raise
        finally:
            os.close(descriptor)

    def link(self, source: Path, destination: Path) -> None:
        os.link(source, destination)

    def rename(self, source: Path, destination: Path) -> None:
        os.rename(source, destination)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path, mode: int) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)


DISK = SystemFiles()


class Staging:
    """A file that is written under another name. A context manager: a file that was not given its
    name by the end of the block is removed."""

    def __init__(self, path: Path, *, mode: int = _MODE, files: FileLayer = DISK) -> None:
        self._path, self._files = path, files
        self._is_open = self._is_there = False
        for number in itertools.count(1):
            self._staging = path.with_name(f"{path.name}#{number}")
            with suppress(FileExistsError):
                self._descriptor = files.open(
                    self._staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode
                )
                self._is_open = self._is_there = True
                return

    def write(self, data: Buffer) -> None:
        self._files.write(self._descriptor, data)

    def create(self) -> bool:
        """Give the file its name, and return True; False where the name is taken."""
        self._seal()
        created = self._linked()
        self._discard()
        # also where another process made the file: it may have been killed before its sync
        self._files.sync_directory(self._path.parent)
        return created

    def replace(self) -> None:
        """Give the file its name, in place of what is there."""
        self._seal()
        self._files.rename(self._staging, self._path)
        self._is_there = False
        self._files.sync_directory(self._path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self._descriptor)
        self._discard()

    def _seal(self) -> None:
        self._files.sync(self._descriptor)
        self._is_open = False
        os.close(self._descriptor)

    def _linked(self) -> bool:
        """Whether the staging file could be given the final name as a second one. `link` is the one
        call that is exclusive and atomic on all file systems."""
        while True:
            try:
                self._files.link(self._staging, self._path)
                return True
            except FileExistsError:
                if self._path.is_file():
                    return False
                if os.path.lexists(self._path):  # a directory, or a link to nothing
                    raise
            # the file was removed in between: try again

    def _discard(self) -> None:
        if self._is_there:
            self._is_there = False
            with suppress(FileNotFoundError):
                self._files.unlink(self._staging)


def create(path: Path, data: Buffer, *, mode: int = _MODE, files: FileLayer = DISK) -> bool:
    """Write a new file, and return True; False if there is one already, which stays as it is.

    Of several processes at once, one gets True.
    """
    with Staging(path, mode=mode, files=files) as staging:
        staging.write(data)
        return staging.create()


def replace(path: Path, data: Buffer, *, files: FileLayer = DISK) -> None:
    """Write a file in place of what is there."""
    with Staging(path, files=files) as staging:
        staging.write(data)
        staging.replace()


def move(source: Path, destination: Path, *, files: FileLayer = DISK) -> None:
    """Give a file another name, also in another directory. Raises FileNotFoundError if there is
    none."""
    files.rename(source, destination)
    # In this order, one of the two names is on disk at any moment.
    for directory in dict.fromkeys((destination.parent, source.parent)):
        files.sync_directory(directory)


def unlink(paths: Iterable[Path], *, files: FileLayer = DISK) -> None:
    """Remove files; one that does not exist is no error. Each directory is synced once."""
    removed = []
    for path in paths:
        with suppress(FileNotFoundError):
            files.unlink(path)
            removed.append(path.parent)
    for directory in dict.fromkeys(removed):
        files.sync_directory(directory)


def remove_tree(path: Path, *, files: FileLayer = DISK) -> None:
    """Remove a directory and all in it, as far as possible. A power cut may bring some or all of it
    back."""
    for folder, directories, names in os.walk(path, topdown=False):
        for name in names:
            with suppress(OSError):
                files.unlink(Path(folder, name))
        for name in directories:
            with suppress(OSError):
                files.rmdir(Path(folder, name))
    with suppress(OSError):
        files.rmdir(path)


def make_directory(path: Path, *, mode: int = 0o777, files: FileLayer = DISK) -> None:
    """Make a directory and its missing parents. One that exists already is no error, and is synced
    into its parent."""
    if not path.parent.is_dir():
        make_directory(path.parent, files=files)
    try:
        files.mkdir(path, mode)
    except OSError:  # of one that exists, an error of permission or of a read-only system may come
        if not path.is_dir():
            if os.path.lexists(path):
                raise NotADirectoryError(
                    errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)
                ) from None
            raise
    files.sync_directory(path.parent)


def move_directory(draft: Path, directory: Path, *, files: FileLayer = DISK) -> None:
    """Give a finished directory its name, once all in it is on disk. Raises OSError where another
    one of that name is not empty."""
    for folder, _, names in os.walk(draft):
        for name in names:
            _sync_file(Path(folder, name), files)
        files.sync_directory(Path(folder))
    files.rename(draft, directory)
    files.sync_directory(directory.parent)


@contextmanager
def whole_directory(directory: Path, *, files: FileLayer = DISK) -> Iterator[Path]:
    """A draft to write into, which becomes `directory` (absent before, or empty) once the block has
    succeeded and all in the draft is on disk.

    The draft is beside the directory, and locked while it is written. A draft that a killed process
    left is not locked: the next process that writes the same directory removes it. Raises OSError
    where the draft cannot be made or renamed.
    """
    # Drafts of killed processes. They stay where the file system has no locks of directories.
    for left in directory.parent.glob(f"{glob.escape(directory.name)}.unfinished-*"):
        with suppress(OSError), _locked(left):
            remove_tree(left, files=files)

    # A draft of our own.
    draft = directory.with_name(f"{directory.name}.unfinished-{token_hex(4)}")
    make_directory(draft, files=files)
    try:
        with ExitStack() as lock:
            with suppress(OSError):
                lock.enter_context(_locked(draft))
            yield draft
            move_directory(draft, directory, files=files)
    finally:
        remove_tree(draft, files=files)


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """A block that no two processes, and no two threads, are in at the same time for the same
    directory. A file system without locks of directories does not hold them apart."""
    with ExitStack() as lock:
        with suppress(OSError):
            lock.enter_context(_locked(directory, wait=True))
        yield


@contextmanager
def _locked(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a directory. Raises OSError where another process holds it, unless it may
    `wait`, or the file system has no such locks."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _sync_file(path: Path, files: FileLayer) -> None:
    descriptor = files.open(path, os.O_RDONLY, 0)
    try:
        files.sync(descriptor)
    finally:
        os.close(descriptor)
