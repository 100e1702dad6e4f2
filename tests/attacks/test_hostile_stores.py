"""What a store may hold that was not put there by us: it is refused, and nothing is allocated, read or written on its word."""

import json
import struct
import tracemalloc
from pathlib import Path

import pytest

from helpers.chunks import make_chunk, small_recipe
from stillhouse.errors import ChunkError, RecipeError, StoreError
from stillhouse.store import ChunkStore, Reader, readers, verify_store

MUCH = 64 << 20  # bytes


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    store = ChunkStore.create(str(tmp_path / "store"), small_recipe())
    store.publish(make_chunk(store.recipe, 0))
    return store


def path_of(store: ChunkStore, number: int) -> Path:
    return Path(store.url) / store.key(number)


@pytest.mark.parametrize("length", [2**63 - 1, 2**40, 100 << 20])
def test_a_header_of_absurd_length_is_refused_before_anything_is_taken_for_it(store: ChunkStore, length: int) -> None:
    path = path_of(store, 0)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    tracemalloc.start()
    with pytest.raises(ChunkError):
        store.fetch(0)
    with pytest.raises(ChunkError):
        store.fetch_rows(0, [0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MUCH


@pytest.mark.parametrize("shape", [[2**31, 2**31], [-1, 4], [0], "many"])
def test_a_tensor_of_absurd_shape_is_refused(store: ChunkStore, shape: object) -> None:
    path = path_of(store, 0)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["targets"]["shape"] = shape
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])
    with pytest.raises(ChunkError):
        store.fetch(0)
    assert [finding.key for finding in verify_store(store.url) if finding.problem] == [store.key(0)]


def test_a_chunk_under_another_number_or_recipe_is_refused(store: ChunkStore) -> None:
    path_of(store, 1).write_bytes(path_of(store, 0).read_bytes())
    with pytest.raises(ChunkError):
        store.fetch(1)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/cron.d/job", "a/b", "", "x" * 1000, "..", "a\\x00b"])
def test_a_reader_has_a_plain_name(store: ChunkStore, name: str) -> None:
    reader = Reader(name=name, global_batch_sequences=8, seed=0, window_chunks=2, total_steps=60, committed_step=12)
    with pytest.raises(StoreError):
        readers.join(store, reader)
    assert not (Path(store.url).parent / "elsewhere").exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"fingerprint": "../.."}', "1" * 100, "{" * 100_000])
def test_a_recipe_that_is_none_is_refused_by_name(store: ChunkStore, text: str) -> None:
    (Path(store.url) / store.folder / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.json"):
        ChunkStore.create(store.url, store.recipe)
