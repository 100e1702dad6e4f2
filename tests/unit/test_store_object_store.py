"""Objects of any size, streamed: whole or not there, what was handed over is what is kept, and one
store waits for no other."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from stillhouse.atomic import SystemFiles
from stillhouse.errors import StoreError
from stillhouse.store.object_layer import ObjectLayer
from stillhouse.store.object_store import Blobs

LARGE = 40 << 20  # more than one part

Write = Callable[[bytes | memoryview], None]


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(str(tmp_path / "root"))


def content(blobs: Blobs, key: str) -> bytes:
    return b"".join(blobs.pieces(key))


def test_a_stream_of_many_parts_is_what_was_written(blobs: Blobs) -> None:
    data = bytes(range(256)) * (LARGE // 256)

    def fill(write: Write) -> None:
        for start in range(0, LARGE, 1_000_003):
            write(memoryview(data)[start : start + 1_000_003])

    blobs.stream("a/b", fill)
    assert content(blobs, "a/b") == data
    blobs.stream("a/b", lambda write: write(b"anew"))
    assert content(blobs, "a/b") == b"anew"
    blobs.stream("empty", lambda _write: None)
    assert content(blobs, "empty") == b""


def test_a_buffer_may_change_as_soon_as_it_was_taken(blobs: Blobs) -> None:
    def fill(write: Write) -> None:
        buffer = bytearray(5)
        for letter in b"abc":
            buffer[:] = bytes([letter]) * 5
            write(memoryview(buffer))

    blobs.stream("a", fill)
    assert content(blobs, "a") == b"aaaaabbbbbccccc"


@pytest.mark.parametrize("size", [5, LARGE])
def test_what_fails_half_way_leaves_the_key_as_it_was(blobs: Blobs, size: int) -> None:
    def fail(write: Write) -> None:
        write(b"y" * size)
        raise KeyError("half way")

    for expected in (None, b"x"):
        with pytest.raises(KeyError):
            blobs.stream("a", fail)
        assert (content(blobs, "a") if blobs.stat("a") else None) == expected
        blobs.stream("a", lambda write: write(b"x"))
    assert blobs.directory is not None
    assert [path.name for path in blobs.directory.iterdir()] == ["a"]


def test_names_are_those_at_the_top_and_a_directory_is_not_made_to_look(
    blobs: Blobs, tmp_path: Path
) -> None:
    assert blobs.names() == []
    assert not (tmp_path / "root").exists()
    for key in ("b.json", "a.json", "folder/c.json"):
        assert blobs.create(key, b"")
    assert (blobs.names(), blobs.folders()) == (["a.json", "b.json"], ["folder"])
    assert (blobs.folders("folder"), blobs.folders("absent")) == ([], [])
    assert blobs.create("folder/deep/d.json", b"")
    assert (blobs.folders("folder"), blobs.folders("fold")) == (["folder/deep"], [])
    assert blobs.folders("a.json") == []


def test_what_is_deleted_is_gone_and_may_be_deleted_again(blobs: Blobs) -> None:
    for key in ("a", "folder/b", "folder/deep/c", "folder2/d"):
        blobs.create(key, b"x")
    for _ in range(2):
        blobs.delete("a")
        blobs.delete_under("folder")
    assert (blobs.names(), blobs.folders()) == ([], ["folder2"])


def test_nothing_is_read_where_nothing_is(blobs: Blobs) -> None:
    with pytest.raises(FileNotFoundError):
        content(blobs, "absent")


@pytest.mark.parametrize("name", ["x" * 256, "/".join(["y" * 200] * 25)], ids=["name", "path"])
def test_a_path_that_no_file_system_takes_is_a_mistake_of_its_user(
    tmp_path: Path, name: str
) -> None:
    blobs = Blobs(str(tmp_path / name))
    for use in (
        blobs.names,
        blobs.folders,
        lambda: blobs.create("a", b""),
        lambda: blobs.read("a"),
    ):
        with pytest.raises(StoreError, match="shorter names"):
            use()


class Absent:
    """An object store that answers every put as if its bucket were no more."""

    def put(self, *_: object, **__: Any) -> None:
        raise FileNotFoundError("404 Not Found")


def test_a_put_that_finds_no_bucket_says_so_and_is_no_absent_object() -> None:
    blobs = Blobs("s3://test-bucket/runs", objects=cast("ObjectLayer", Absent()))
    for put in (blobs.create, blobs.replace):
        with pytest.raises(StoreError, match="cannot write a in s3://test-bucket/runs"):
            put("a", b"x")


class Hanging(SystemFiles):
    """A disk that does not answer until it is let go."""

    def __init__(self) -> None:
        self.is_asked, self.let_go = threading.Event(), threading.Event()

    def mkdir(self, path: Path, mode: int) -> None:
        self.is_asked.set()
        self.let_go.wait(30)
        super().mkdir(path, mode)


def test_a_directory_that_does_not_answer_holds_up_no_other(tmp_path: Path) -> None:
    disk = Hanging()
    on_it = threading.Thread(
        target=Blobs(str(tmp_path / "a"), files=disk).create, args=("x", b"1"), daemon=True
    )
    elsewhere = threading.Thread(
        target=Blobs(str(tmp_path / "b")).create, args=("x", b"1"), daemon=True
    )
    on_it.start()
    assert disk.is_asked.wait(30)
    elsewhere.start()
    elsewhere.join(10)
    try:
        assert not elsewhere.is_alive()
        assert on_it.is_alive()
    finally:
        disk.let_go.set()
        on_it.join(30)
