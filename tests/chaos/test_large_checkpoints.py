"""A checkpoint file far larger than what may be held at one time is read from an object store, in
bounded memory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import xxhash

from helpers.rangeserver import RangeServer, sparse_file
from helpers.s3 import s3_environment
from stillhouse.checkpoint.integrity import Digest
from stillhouse.store.object_store import Blobs

NUM_BYTES = 5_000_000_000
# 128 MiB of ranges, what obstore's connections hold, and what the allocator keeps
MOST_BYTES = 256 << 20


@pytest.mark.long_form
def test_5_gb_are_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of a sparse file, and into another: neither disk nor memory has room for it."""
    with RangeServer(
        {"/bucket/large.pt": sparse_file(tmp_path / "source", NUM_BYTES)}
    ).running() as server:
        for name, value in s3_environment(server.endpoint).items():
            monkeypatch.setenv(name, value)
        digest = Digest()
        with grown_memory() as grown, (tmp_path / "copy").open("wb") as copy:
            for piece in Blobs("s3://bucket").pieces("large.pt"):
                digest.add(piece)
                write_sparsely(copy, piece)
            copy.truncate(NUM_BYTES)
    assert digest.value == digest_of(tmp_path / "source")
    assert digest.value == digest_of(tmp_path / "copy")
    assert max(grown) < MOST_BYTES


def write_sparsely(file: BinaryIO, piece: memoryview) -> None:
    zeros = bytes(1 << 16)
    for start in range(0, len(piece), len(zeros)):
        part = piece[start : start + len(zeros)]
        if part == zeros[: len(part)]:
            file.seek(len(part), 1)
        else:
            file.write(part)


def digest_of(path: Path) -> tuple[int, str]:
    hasher, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
            size += len(piece)
    return size, hasher.hexdigest()


@contextmanager
def grown_memory() -> Iterator[list[int]]:
    """By how many bytes this process has grown, as it is looked at fifty times a second."""
    before, grown, stopped = resident_bytes(), list[int](), threading.Event()

    def look() -> None:
        while not stopped.wait(0.02):
            grown.append(resident_bytes() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield grown
    finally:
        stopped.set()
        thread.join()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
