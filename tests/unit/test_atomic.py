"""Atomic files: of several writers one wins, a killed writer leaves no half of a file, and a
refusal says what to do."""

import errno
import multiprocessing
import os
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from stillhouse.atomic import (
    Buffer,
    SystemFiles,
    create,
    make_directory,
    move_directory,
    replace,
    whole_directory,
)
from stillhouse.errors import StoreError
from stillhouse.store import StoreUnavailable
from stillhouse.store.object_store import Blobs

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["helpers.chunks", "pytest"])
NUM_NAMES, NUM_WRITERS = 40, 8
SIZE = 1 << 16


def create_all(url: str, writer: int, told: Connection) -> None:
    blobs = Blobs(url)
    told.send(
        [blobs.create(f"folder/{number}", bytes([writer]) * SIZE) for number in range(NUM_NAMES)]
    )


def test_of_eight_processes_one_creates_each_object(tmp_path: Path) -> None:
    pipes = [FORKING.Pipe(duplex=False) for _ in range(NUM_WRITERS)]
    writers = [
        FORKING.Process(target=create_all, args=(str(tmp_path), i, pipes[i][1]))
        for i in range(NUM_WRITERS)
    ]
    for writer in writers:
        writer.start()
    created = [here.recv() for here, _ in pipes]
    for writer in writers:
        writer.join()
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == sorted(
        map(str, range(NUM_NAMES))
    )
    for number in range(NUM_NAMES):
        (winner,) = [i for i in range(NUM_WRITERS) if created[i][number]]
        assert (tmp_path / "folder" / str(number)).read_bytes() == bytes([winner]) * SIZE


def replace_until_killed(path: Path, started: Connection) -> None:
    started.send(None)
    while True:
        for letter in b"ab":
            replace(path, bytes([letter]) * (8 << 20))


def test_a_killed_writer_leaves_one_of_the_two_files_and_a_leftover_at_most(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for _ in range(3):
        replace(path, b"a" * (8 << 20))
        here, there = FORKING.Pipe(duplex=False)
        writer = FORKING.Process(target=replace_until_killed, args=(path, there))
        writer.start()
        here.recv()
        before = path.stat().st_ino
        while path.stat().st_ino == before:
            pass
        writer.kill()
        writer.join()
        assert path.read_bytes() in (b"a" * (8 << 20), b"b" * (8 << 20))
        assert all(re.fullmatch(r"file(#\d+)?", found.name) for found in tmp_path.iterdir())
    assert Blobs(str(tmp_path)).names() == ["file"]


class Refusing(SystemFiles):
    """A file system that refuses one call."""

    def __init__(self, call: str, number: int) -> None:
        self._call, self._number = call, number

    def open(self, path: Path, flags: int, mode: int) -> int:
        self._refuse("open")
        return super().open(path, flags, mode)

    def write(self, descriptor: int, data: Buffer) -> None:
        super().write(descriptor, bytes(data)[:1])
        self._refuse("write")

    def sync(self, *_: object) -> None:
        self._refuse("sync")

    def link(self, source: Path, destination: Path) -> None:
        self._refuse("name")
        super().link(source, destination)

    def rename(self, source: Path, destination: Path) -> None:
        self._refuse("name")
        super().rename(source, destination)

    def _refuse(self, call: str) -> None:
        if call == self._call:
            raise OSError(self._number, os.strerror(self._number))


WRITES: dict[str, Callable[[Blobs, str], object]] = {
    "create": lambda blobs, key: blobs.create(key, b"data"),
    "replace": lambda blobs, key: blobs.replace(key, b"data"),
    "stream": lambda blobs, key: blobs.stream(key, lambda write: write(b"data")),
}


@pytest.mark.parametrize("call", ["open", "write", "sync", "name"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [
        (errno.ENOSPC, StoreUnavailable, "the disk is full, or the quota spent: free some space"),
        (errno.EDQUOT, StoreUnavailable, "the disk is full, or the quota spent"),
        (errno.EACCES, StoreError, "permission denied"),
        (errno.EROFS, StoreError, "permission denied"),
    ],
)
def test_a_refusal_is_told_in_words_and_leaves_nothing(
    tmp_path: Path, write: str, call: str, number: int, kind: type[StoreError], advice: str
) -> None:
    blobs = Blobs(str(tmp_path), files=Refusing(call, number))
    with pytest.raises(kind, match=f"cannot write a in {tmp_path}: {advice}") as caught:
        WRITES[write](blobs, "a")
    assert isinstance(caught.value, StoreUnavailable) == (kind is StoreUnavailable)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["../a", "a/../../b", "/etc/a", "a/./b", "..", "", "a/", "a#1", "a\0b"]
)
@pytest.mark.parametrize("write", WRITES)
def test_no_key_leads_out_of_a_directory_or_looks_like_a_leftover(
    tmp_path: Path, write: str, key: str
) -> None:
    with pytest.raises(StoreError, match="key"):
        WRITES[write](Blobs(str(tmp_path / "root")), key)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class Swept(SystemFiles):
    """A file system on which the first staging file is taken for a leftover and removed, before it
    has its name."""

    def __init__(self) -> None:
        self.num_swept = 0

    def sync(self, descriptor: int) -> None:
        if not self.num_swept:
            self.num_swept += 1
            os.unlink(os.readlink(f"/proc/self/fd/{descriptor}"))


@pytest.mark.parametrize("write", ["create", "replace"])
def test_a_staging_file_that_was_swept_away_is_written_again(tmp_path: Path, write: str) -> None:
    files = Swept()
    WRITES[write](Blobs(str(tmp_path), files=files), "a")
    assert files.num_swept == 1
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"data")]


@pytest.mark.parametrize("in_the_way", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_not_taken_for_one_that_was_published(
    tmp_path: Path, in_the_way: Callable[[Path], None]
) -> None:
    in_the_way(tmp_path / "a")
    with pytest.raises(StoreError, match="something else is in its place") as caught:
        Blobs(str(tmp_path)).create("a", b"data")
    assert not isinstance(caught.value, StoreUnavailable)  # nobody waits for it
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_new_file_has_the_mode_that_was_asked_for_and_the_data(tmp_path: Path) -> None:
    assert create(tmp_path / "secret", b"token", mode=0o600)
    assert not create(tmp_path / "secret", b"other", mode=0o644)
    assert ((tmp_path / "secret").stat().st_mode & 0o777, (tmp_path / "secret").read_bytes()) == (
        0o600,
        b"token",
    )


class Ordered(SystemFiles):
    """Keeps the paths that were synced or renamed, in order."""

    def __init__(self) -> None:
        self.order: list[tuple[str, str]] = []

    def sync(self, descriptor: int) -> None:
        self.order.append(("synced", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def sync_directory(self, path: Path) -> None:
        self.order.append(("synced", path.name))

    def rename(self, source: Path, destination: Path) -> None:
        super().rename(source, destination)
        self.order.append(("renamed", source.name))


def test_all_in_a_directory_is_on_disk_before_the_directory_has_its_name(tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    (draft / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (draft / name).write_bytes(b"data")
    files = Ordered()
    move_directory(draft, tmp_path / "made", files=files)
    *before, renamed, last = files.order
    assert sorted(before) == [("synced", name) for name in ("a", "b", "c", "draft", "inner")]
    assert (renamed, last) == (("renamed", "draft"), ("synced", tmp_path.name))
    assert (tmp_path / "made" / "inner" / "c").read_bytes() == b"data"


class ReadOnlyFiles(SystemFiles):
    def mkdir(self, path: Path, mode: int) -> None:
        assert mode
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def test_a_directory_that_cannot_be_made_is_told_with_the_systems_own_reason(
    tmp_path: Path,
) -> None:
    make_directory(tmp_path, files=ReadOnlyFiles())  # it is there, whatever the system says
    with pytest.raises(OSError, match="Read-only file system"):
        make_directory(tmp_path / "new", files=ReadOnlyFiles())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_directory(tmp_path / "file")


def test_each_new_directory_is_synced_into_the_one_above_it(tmp_path: Path) -> None:
    files = Ordered()
    make_directory(tmp_path / "a" / "b" / "c", files=files)
    assert [name for _, name in files.order] == [tmp_path.name, "a", "b"]
    make_directory(tmp_path / "a" / "b" / "c")


def test_a_directory_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def stop_halfway() -> None:
        with whole_directory(tmp_path / "models") as draft:
            (draft / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert [*tmp_path.iterdir()] == []
    with whole_directory(tmp_path / "models") as draft:
        (draft / "whole").touch()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_draft_that_another_writes_is_left_alone_and_one_of_a_killed_process_is_removed(
    tmp_path: Path,
) -> None:
    names = "a[1]", "a[1].unfinished-of-a-killed-one", "a1.unfinished-of-another-directory"
    left, other = tmp_path / names[1], tmp_path / names[2]
    for folder in (left, other):
        folder.mkdir()
        (folder / "half").touch()
    with whole_directory(tmp_path / names[0]) as slow:
        (slow / "slow").touch()
        (tmp_path / names[0]).mkdir()  # empty, as a user may have made it
        with whole_directory(tmp_path / names[0]) as fast:
            (fast / "fast").touch()
        assert (slow / "slow").exists()
        assert not left.exists()
        assert [path.name for path in (tmp_path / names[0]).iterdir()] == ["fast"]
        (tmp_path / names[0] / "fast").unlink()
    assert [path.name for path in (tmp_path / names[0]).iterdir()] == ["slow"]
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2]}


def test_a_directory_that_has_something_in_it_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").touch()
    with pytest.raises(OSError, match="not empty"), whole_directory(tmp_path / "models") as draft:
        (draft / "new").touch()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_directory_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # not "Not a directory": nothing is in its place
        make_directory(Path("/proc/nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_directory(tmp_path / "file" / "inner")
