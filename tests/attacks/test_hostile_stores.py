"""What a store may hold that was not put there by us: it is refused, and nothing is allocated, read
or written on its word."""

import json
import os
import struct
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.chunks import arrays_of, make_chunk, small_recipe
from helpers.command import stillhouse
from helpers.sealing import canonical, chunk_file, header_of, metadata_of, sealed_chunk, sealed_json
from stillhouse.errors import ChunkError, RecipeError, StoreError
from stillhouse.store import ChunkStore, Consumer, Recipe, consumers, list_recipes, verify_store
from stillhouse.store.chunk import pack_chunk, parse_index
from stillhouse.store.labels import Label, put_label
from stillhouse.store.recipe import parse_recipe

MUCH = 64 << 20  # bytes
FORMATS: dict[int, dict[str, Any]] = {
    1: {},
    2: {"num_draws": 3, "weighted": True, "label_logprob": True, "tail_entropy": True},
}
in_both_formats = pytest.mark.parametrize("version", FORMATS)


def recipe_of(version: int, **changes: Any) -> Recipe:
    """A small recipe of a format, with all that its records can hold."""
    return small_recipe(format=version, **FORMATS[version], **changes)


@pytest.fixture(params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ChunkStore:
    """A store of each format in turn, with one chunk."""
    store = ChunkStore.create(str(tmp_path / "store"), recipe_of(request.param))
    store.publish(make_chunk(store.recipe, 0))
    return store


def path_of(store: ChunkStore, number: int) -> Path:
    """Where a chunk is, or would be."""
    path = Path(store.url) / store.key(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("length", [2**63 - 1, 2**40, 100 << 20])
def test_a_header_of_absurd_length_is_refused_before_anything_is_taken_for_it(
    store: ChunkStore, length: int
) -> None:
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


@pytest.mark.parametrize(
    "name", ["../elsewhere", "/etc/cron.d/job", "a/b", "", "x" * 1000, "..", "a\\x00b"]
)
def test_a_reader_has_a_plain_name(store: ChunkStore, name: str) -> None:
    reader = Consumer(
        name=name,
        global_batch_sequences=8,
        seed=0,
        window_chunks=2,
        total_steps=60,
        committed_step=12,
    )
    with pytest.raises(StoreError):
        consumers.join(store, reader)
    assert not (Path(store.url).parent / "elsewhere").exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"fingerprint": "../.."}', "1" * 100, "{" * 100_000])
def test_a_recipe_that_is_none_is_refused_by_name(store: ChunkStore, text: str) -> None:
    (Path(store.url) / store.folder / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.json"):
        ChunkStore.create(store.url, store.recipe)


ABSURD = {
    "a temperature that no float holds": {"temperature": 10**400},
    "a chunk of more rows than can be counted": {"chunk_sequences": 2**63, "num_sequences": 2**63},
    "a chunk of 4 rows whose bytes are 0 in 64 bits": {"sequence_length": 2**62},
    "more tokens than an id of 32 bits can name": {"vocab_size": 2**31 + 1},
    "more chunks than a name of ten digits can number": {"num_sequences": 10**12},
}


@in_both_formats
@pytest.mark.parametrize("case", ABSURD)
def test_a_recipe_of_absurd_numbers_is_refused_by_name(
    tmp_path: Path, case: str, version: int
) -> None:
    data = canonical({**json.loads(recipe_of(version).canonical_json()), **ABSURD[case]})
    with pytest.raises(RecipeError, match=r"^recipe\.json: this recipe cannot be used"):
        parse_recipe(data, where="recipe.json")
    (tmp_path / ("0" * 16)).mkdir()
    (tmp_path / ("0" * 16) / "recipe.json").write_bytes(data)
    assert [finding.problem is None for finding in verify_store(str(tmp_path))] == [False]
    assert list_recipes(str(tmp_path)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"label_logprob": 2**63},
        {"tail_entropy": -2},
        {"draws": {"weighted": True}},
        {"source": {"kind": "corpus", "digest": ["xxh3:corpus"]}},
        {"source": {"kind": "../..", "digest": ""}},
        {"teacher": "sha256:teacher"},
        {"teacher": {"kind": "shell", "digest": "sha256:teacher", "numerics": "float32"}},
    ],
)
def test_a_recipe_whose_parts_are_of_another_kind_is_refused_by_name(
    change: dict[str, object],
) -> None:
    data = canonical({**json.loads(recipe_of(2).canonical_json()), **change})
    with pytest.raises(RecipeError, match=r"^recipe\.json"):
        parse_recipe(data, where="recipe.json")


@in_both_formats
def test_a_recipe_of_many_rows_takes_no_memory_for_a_chunk_that_has_none(
    tmp_path: Path, version: int
) -> None:
    """A reader of rows asks for as many bytes as the index of such a chunk may have: 32 GiB."""
    many = {"num_sequences": 2**31 - 1, "chunk_sequences": 2**31 - 1}
    store = ChunkStore.create(str(tmp_path), recipe_of(version, **many))
    path, few = path_of(store, 0), recipe_of(version)
    path.write_bytes(pack_chunk(make_chunk(few), few))
    tracemalloc.start()
    with pytest.raises(ChunkError):
        store.fetch_rows(0, [0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MUCH


def test_an_index_that_a_server_cuts_short_is_refused_whatever_its_checksum(
    store: ChunkStore,
) -> None:
    data = path_of(store, 0).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0] + 16 * 4 + 8
    cut = sealed_chunk(data[: end - 1], num_rows=4)
    with pytest.raises(ChunkError, match="chunk 0"):
        parse_index(cut, store.recipe, 0, num_bytes=len(data))


@pytest.mark.parametrize("checksum", ["0" * 16 + "x", {"xxh3": "0" * 16}])
def test_a_checksum_is_its_16_digits_and_nothing_more(store: ChunkStore, checksum: object) -> None:
    """The digits are there and are right, with something behind or around them."""
    chunk, recipe = make_chunk(store.recipe, 0), json.loads(store.recipe.canonical_json())
    arrays = arrays_of(chunk)
    whole, changed = (
        canonical({**metadata_of(recipe, 0), "xxh3": text}) for text in ("0" * 16, checksum)
    )
    path_of(store, 0).write_bytes(chunk_file(arrays, canonical(header_of(arrays, whole))))
    store.verify(0)
    path_of(store, 0).write_bytes(chunk_file(arrays, canonical(header_of(arrays, changed))))
    with pytest.raises(ChunkError, match="carries the checksum"):
        store.fetch(0)


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0xFF])
def test_records_of_nonsense_with_right_checksums_are_found_and_moved_aside(
    store: ChunkStore, byte: int
) -> None:
    arrays = arrays_of(make_chunk(store.recipe, 0))
    arrays["targets"] = np.full_like(arrays["targets"], byte)
    metadata = canonical(metadata_of(json.loads(store.recipe.canonical_json()), 0))
    path_of(store, 0).write_bytes(chunk_file(arrays, canonical(header_of(arrays, metadata))))
    store.fetch(0)
    with pytest.raises(ChunkError, match="chunk 0 is as it was published, but the record of row 0"):
        store.verify(0)
    assert store.quarantine(0)
    assert store.published() == set()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../elsewhere"},
        {"global_batch_sequences": 0},
        {"window_chunks": 0},
        {"window_chunks": -1},
        {"global_batch_sequences": 2**64},
        {"total_steps": 2**64},
        {"committed_step": -1},
    ],
)
def test_a_consumer_of_absurd_values_is_unknown_and_hides_no_other(
    store: ChunkStore, change: dict[str, object]
) -> None:
    sound = Consumer(
        name="a",
        global_batch_sequences=8,
        seed=0,
        window_chunks=2,
        total_steps=60,
        committed_step=12,
    )
    consumers.join(store, sound)
    values = sealed_json({**asdict(sound), "name": "b", "version": 1, **change}, sort_keys=True)
    (Path(store.url) / store.folder / "readers" / "b.json").write_bytes(canonical(values))
    assert consumers.registered(store) == ([sound], [f"{store.folder}/readers/b.json"])


def test_a_chunk_has_the_name_that_its_number_gives_it(store: ChunkStore) -> None:
    """Digits of other scripts are numbers to Python, too."""
    path = path_of(store, 0)
    path.with_name(path.name.replace("0000000000", "000000000\u0662")).write_bytes(
        path.read_bytes()
    )
    assert store.published() == {0}
    assert store.listing().cut == set()


def test_a_label_steers_no_terminal_and_opens_no_other_file(store: ChunkStore) -> None:
    """The pipe would never open, and the link leads out of the store."""
    folder = Path(store.url) / store.folder / "labels"
    names = {"teacher": "[/x]\x1b[2J", "dataset": "\u202ea\nb"}
    put_label(store, Label(run="demo", created="2026-11-29T08:00:00Z", names=names))
    secret = json.dumps({"run": "link", "names": {"password": "hunter2"}})
    (folder.parent.parent.parent / "secret.json").write_text(secret)
    (folder / "link.json").symlink_to("../../../secret.json")
    os.mkfifo(folder / "pipe.json")
    (folder / "\x9b2J.json").write_bytes(b"{}")
    for verb in ("ls", "stat"):
        outcome = stillhouse("store", verb, store.url)
        assert outcome.code == 0, outcome
        assert "[/x]\\x1b[2J" in outcome.out
        assert "\\u202ea\\nb" in outcome.out
        assert f"{store.folder}/labels/link.json is no label" in outcome.out
        assert "hunter2" not in outcome.out
        assert not {"\x1b", "\x9b", "\u202e"} & set(outcome.out)
