"""The store in a directory: existence is the commit, a bad chunk is found and named, and a failure
says what to do."""

import multiprocessing
import os
import pickle
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import time

import numpy as np
import pytest
import xxhash
from obstore.exceptions import GenericError, PermissionDeniedError, PreconditionError

from helpers.chunks import make_chunk, small_recipe
from helpers.damage import read_only
from stillhouse.errors import ChunkError, RecipeError, StoreError
from stillhouse.sequence import joined
from stillhouse.store import (
    Chunk,
    ChunkMissing,
    ChunkStore,
    StoreForbidden,
    StoreUnavailable,
    list_recipes,
    pack_chunk,
    sweep,
    verify_store,
)
from stillhouse.store.chunk_store import number_of
from stillhouse.store.explain import explain
from stillhouse.store.object_store import Blobs

RECIPE = small_recipe()


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore.create(str(tmp_path / "store"), RECIPE)


def path_of(store: ChunkStore, number: int) -> Path:
    return Path(store.url) / store.key(number)


def assert_rows(found: Chunk, wanted: Chunk, rows: list[int]) -> None:
    wanted_rows = [wanted.row(row) for row in rows]
    for array, wanted_array in zip(
        found.sequences.arrays, joined([row.sequences for row in wanted_rows]).arrays, strict=True
    ):
        np.testing.assert_array_equal(array, wanted_array)
    np.testing.assert_array_equal(
        found.targets_NB, np.concatenate([row.targets_NB for row in wanted_rows])
    )


def test_the_layout_is_the_one_of_the_format_page(store: ChunkStore) -> None:
    ref = store.publish(make_chunk(RECIPE, 2))
    root = Path(store.url)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    folder = RECIPE.fingerprint[:16]
    assert files == [f"{folder}/chunks/0000000002.safetensors", f"{folder}/recipe.json"]
    assert (root / folder / "recipe.json").read_bytes() == RECIPE.canonical_json()
    assert path_of(store, 2).read_bytes() == pack_chunk(make_chunk(RECIPE, 2), RECIPE)
    assert (ref.name, ref.number, ref.num_bytes, ref.duplicate) == (
        store.key(2),
        2,
        path_of(store, 2).stat().st_size,
        False,
    )


def test_what_is_published_is_fetched(store: ChunkStore) -> None:
    chunk = make_chunk(RECIPE, 1)
    assert not store.exists(1)
    assert store.published() == set()
    store.publish(chunk)
    assert store.exists(1)
    assert store.published() == {1}
    assert_rows(store.fetch(1), chunk, [0, 1, 2, 3])


@pytest.mark.parametrize("rows", [[0], [3], [2, 0], [1, 1, 3], [3, 2, 1, 0], []])
def test_any_rows_are_fetched_in_the_order_asked(store: ChunkStore, rows: list[int]) -> None:
    chunk = make_chunk(RECIPE, 0)
    store.publish(chunk)
    for asked in (rows, np.array(rows, np.int64)):
        found = store.fetch_rows(0, asked)
        assert found.sequences.token_ids_SL.shape == (len(rows), 12)
        if rows:
            assert_rows(found, chunk, rows)


def test_a_damaged_row_is_named_and_spoils_no_other(store: ChunkStore) -> None:
    chunk = make_chunk(RECIPE, 0)
    store.publish(chunk)
    damaged = bytearray(path_of(store, 0).read_bytes())
    damaged[-1] ^= 1
    path_of(store, 0).write_bytes(damaged)
    assert_rows(store.fetch_rows(0, [0, 2]), chunk, [0, 2])
    with pytest.raises(ChunkError, match="row 3 hashes to"):
        store.fetch_rows(0, [0, 3])


def test_extents_near_and_far_overlapping_and_empty_are_read_in_the_order_asked(
    tmp_path: Path,
) -> None:
    data = np.random.default_rng(0).bytes(2_000_000)
    blobs = Blobs(str(tmp_path))
    blobs.create("a", data)
    extents = [
        (1_999_990, 2_000_000),
        (0, 10),
        (5, 20),
        (7, 7),
        (1_000_000, 1_300_000),
        (900_000, 900_001),
        (0, 2_000_000),
    ]
    for asked in (extents, extents[:-1]):
        assert [bytes(piece) for piece in blobs.read_extents("a", asked)] == [
            data[start:end] for start, end in asked
        ]
    assert [len(piece) for piece in blobs.read_extents("a", [(1_999_999, 2_000_005), (0, 5)])] == [
        1,
        5,
    ]
    assert [len(piece) for piece in blobs.read_extents("a", [(2_000_000, 2_000_005), (0, 5)])] == [
        0,
        0,
    ]
    start, num_bytes = blobs.read_start("a", 3_000_000)
    assert (bytes(start), num_bytes) == (data, 2_000_000)


def test_a_row_that_is_not_in_the_chunk_is_refused(store: ChunkStore) -> None:
    store.publish(make_chunk(RECIPE, 2))
    for row in (-1, 2):
        with pytest.raises(IndexError, match=f"chunk 2 has rows 0 to 1, not {row}"):
            store.fetch_rows(2, [row])


def test_a_chunk_that_is_not_there_yet_is_missing_and_one_outside_the_recipe_is_an_error(
    store: ChunkStore,
) -> None:
    for fetch in (store.fetch, store.verify, lambda number: store.fetch_rows(number, [0])):
        with pytest.raises(ChunkMissing, match="chunk 1 is not in"):
            fetch(1)
        with pytest.raises(RecipeError, match="no chunk 3"):
            fetch(3)
    with pytest.raises(RecipeError, match="no chunk -1"):
        store.exists(-1)


def test_the_second_publisher_of_a_chunk_loses_and_changes_nothing(store: ChunkStore) -> None:
    first, second = make_chunk(RECIPE, 0, seed=1), make_chunk(RECIPE, 0, seed=2)
    assert not store.publish(first).duplicate
    assert store.publish(second).duplicate
    assert_rows(store.fetch(0), first, [0, 1, 2, 3])


def test_of_eight_publishers_at_once_one_wins(store: ChunkStore) -> None:
    chunks = [make_chunk(RECIPE, 0, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(store.publish, chunks))
    winners = [chunk for chunk, ref in zip(chunks, refs, strict=True) if not ref.duplicate]
    assert len(winners) == 1
    assert_rows(store.fetch(0), winners[0], [0, 1, 2, 3])


def test_many_threads_read_one_store(store: ChunkStore) -> None:
    chunks = [make_chunk(RECIPE, number) for number in range(3)]
    for chunk in chunks:
        store.publish(chunk)
    asked = [(number % 3, [number % 2, 0]) for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ask: store.fetch_rows(*ask), asked))
    for (number, rows), chunk in zip(asked, found, strict=True):
        assert_rows(chunk, chunks[number], rows)


def test_a_store_travels_to_other_processes_by_its_url_and_recipe(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.publish(make_chunk(RECIPE, 0))
    store.fetch_rows(0, [0])
    twin = pickle.loads(pickle.dumps(store))
    assert (twin.url, twin.recipe, twin.published()) == (store.url, store.recipe, {0})
    monkeypatch.chdir(tmp_path)
    relative = ChunkStore("store", RECIPE)
    monkeypatch.chdir("/")
    assert relative.published() == {0}


def test_creating_a_store_again_finds_it_and_another_recipe_gets_its_own_place(
    store: ChunkStore,
) -> None:
    store.publish(make_chunk(RECIPE, 0))
    assert ChunkStore.create(store.url, RECIPE).published() == {0}
    assert ChunkStore.create(store.url, small_recipe(k=5)).published() == set()


def test_a_recipe_json_of_another_recipe_is_refused_saying_what_differs(store: ChunkStore) -> None:
    path = Path(store.url) / RECIPE.fingerprint[:16] / "recipe.json"
    path.write_bytes(small_recipe(k=5).canonical_json())
    with pytest.raises(
        RecipeError, match=r"another recipe: k \(exact entries a token\): 4 against 5"
    ):
        ChunkStore.create(store.url, RECIPE)


def test_file_urls_and_paths_with_spaces_are_directories(tmp_path: Path) -> None:
    ChunkStore.create(f"file://{tmp_path}/with%20space", RECIPE).publish(make_chunk(RECIPE, 0))
    assert ChunkStore(str(tmp_path / "with space"), RECIPE).published() == {0}


def test_a_memory_store_is_one_per_process_and_refuses_to_leave_it() -> None:
    store = ChunkStore.create("memory://one-per-process", RECIPE)
    store.publish(make_chunk(RECIPE, 0))
    assert ChunkStore("memory://one-per-process", RECIPE).fetch_rows(
        0, [1]
    ).sequences.token_ids_SL.shape == (1, 12)
    assert ChunkStore("memory://another", RECIPE).published() == set()
    with pytest.raises(StoreError, match="lives in one process"):
        pickle.dumps(store)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host/path",
        "http://host/path",
        "file://host/path",
        "s3://bucket/../other",
        "s3://",
        "gs:///chunks",
    ],
)
def test_a_url_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="the store's URL is"):
        ChunkStore(url, RECIPE)


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/passwd"])
def test_no_key_leads_out_of_the_root(tmp_path: Path, key: str) -> None:
    root = tmp_path / "root"
    with pytest.raises(StoreError, match="key"):
        Blobs(str(root)).create(key, b"x")
    assert not (tmp_path / "outside").exists()


def test_a_repaired_chunk_is_read_although_its_old_index_is_known(store: ChunkStore) -> None:
    old, new = make_chunk(RECIPE, 0, seed=1), make_chunk(RECIPE, 0, seed=2)
    store.publish(old)
    assert_rows(store.fetch_rows(0, [2]), old, [2])
    path_of(store, 0).unlink()
    with pytest.raises(ChunkMissing):
        store.fetch_rows(0, [2])
    store.publish(new)
    assert_rows(store.fetch_rows(0, [2]), new, [2])


@pytest.mark.parametrize("known", [False, True])
def test_every_truncation_is_refused_by_range_too(store: ChunkStore, known: bool) -> None:
    store.publish(make_chunk(RECIPE, 0))
    path = path_of(store, 0)
    data = path.read_bytes()
    for length in [*range(0, len(data), 97), len(data) - 1]:
        path.write_bytes(data)
        reader = ChunkStore(store.url, RECIPE)
        if known:
            reader.fetch_rows(0, [3])
        path.write_bytes(data[:length])
        with pytest.raises(ChunkError, match="chunk 0"):
            reader.fetch_rows(0, [0, 1, 2, 3])


def test_a_flipped_bit_anywhere_in_what_is_read_is_refused_by_range_too(store: ChunkStore) -> None:
    store.publish(make_chunk(RECIPE, 0))
    path = path_of(store, 0)
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(ChunkError, match="chunk 0"):
            ChunkStore(store.url, RECIPE).fetch_rows(0, [0, 1, 2, 3])


def test_a_bad_chunk_is_quarantined_and_may_be_published_anew(store: ChunkStore) -> None:
    store.publish(make_chunk(RECIPE, 0, seed=1))
    damaged = bytearray(path_of(store, 0).read_bytes())
    damaged[-1] ^= 1
    path_of(store, 0).write_bytes(damaged)
    assert store.quarantine(0)
    assert not store.exists(0)
    assert not store.publish(make_chunk(RECIPE, 0, seed=2)).duplicate
    (kept,) = sweep(store.url, older_than_s=0.0, now=0.0).quarantined
    assert (Path(store.url) / kept).read_bytes() == damaged


def test_a_good_chunk_cannot_be_quarantined_and_a_missing_one_needs_publishing(
    store: ChunkStore,
) -> None:
    store.publish(make_chunk(RECIPE, 0))
    assert not store.quarantine(0)
    assert store.exists(0)
    assert store.quarantine(1)


def test_records_that_cannot_be_decoded_are_found_although_their_hashes_fit(
    store: ChunkStore,
) -> None:
    chunk = make_chunk(RECIPE, 0)
    chunk.targets_NB[3] = 0xFF
    store.publish(chunk)
    store.fetch(0)
    with pytest.raises(ChunkError, match=r"chunk 0 is as it was published, but .*row 3"):
        store.verify(0)
    assert store.quarantine(0)
    assert not store.exists(0)


def test_a_store_is_listed_by_recipe(store: ChunkStore, tmp_path: Path) -> None:
    assert list_recipes(str(tmp_path / "nothing here")) == []
    assert not (tmp_path / "nothing here").exists()
    refs = [store.publish(make_chunk(RECIPE, number)) for number in range(2)]
    other = ChunkStore.create(store.url, small_recipe(k=5)).recipe
    (Path(store.url) / "unrelated").mkdir()
    (Path(store.url) / ("0" * 16)).mkdir()
    listed = {entry.fingerprint16: entry for entry in list_recipes(store.url)}
    assert listed == {
        RECIPE.fingerprint[:16]: (
            RECIPE.fingerprint[:16],
            RECIPE,
            2,
            sum(ref.num_bytes for ref in refs),
        ),
        other.fingerprint[:16]: (other.fingerprint[:16], other, 0, 0),
    }


def test_verifying_a_store_names_everything_that_is_wrong_and_nothing_else(
    store: ChunkStore,
) -> None:
    for number in range(3):
        store.publish(make_chunk(RECIPE, number))
    root, folder = Path(store.url), RECIPE.fingerprint[:16]
    path_of(store, 1).write_bytes(path_of(store, 0).read_bytes())
    (root / folder / "chunks" / "notes.txt").write_text("hello")
    (root / folder / "chunks" / "0000000007.safetensors").write_bytes(b"")
    (root / "00000000deadbeef").mkdir()
    (root / "00000000deadbeef" / "recipe.json").write_bytes(RECIPE.canonical_json())
    found = {finding.key: finding for finding in verify_store(store.url)}
    problems = {
        key: finding.problem for key, finding in found.items() if finding.problem is not None
    }
    assert set(found) - set(problems) == {f"{folder}/recipe.json", store.key(0), store.key(2)}
    assert {key: finding.number for key, finding in found.items()}[store.key(2)] == 2
    assert "wanted 1" in problems.pop(store.key(1))
    assert "not the name of a chunk" in problems.pop(f"{folder}/chunks/notes.txt")
    assert "no chunk 7" in problems.pop(f"{folder}/chunks/0000000007.safetensors")
    assert "its directory is named 00000000deadbeef" in problems.pop("00000000deadbeef/recipe.json")
    assert problems == {}


def test_leftovers_of_killed_writers_are_swept_once_they_are_old(store: ChunkStore) -> None:
    store.publish(make_chunk(RECIPE, 0))
    chunks = path_of(store, 0).parent
    old, young = chunks / "0000000001.safetensors#1", chunks / "0000000002.safetensors#13"
    for path, written in ((old, 1000.0), (young, 1990.0)):
        path.write_bytes(b"part of a chunk")
        os.utime(path, (written, written))
    os.utime(path_of(store, 0), (1.0, 1.0))
    assert store.published() == {0}
    assert sweep(store.url, older_than_s=60.0, now=2000.0).removed == [str(old)]
    assert sorted(chunks.iterdir()) == [path_of(store, 0), young]


def test_a_sweep_beside_writers_whose_staging_files_come_and_go_ends_well(
    store: ChunkStore,
) -> None:
    store.publish(make_chunk(RECIPE, 0))
    staging = [
        path_of(store, 0).with_name(f"0000000001.safetensors#{number}") for number in range(300)
    ]

    def come_and_go() -> None:
        for _ in range(10):
            for path in staging:
                path.touch()
            for path in staging:
                path.unlink()

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(come_and_go)
        while not writing.done():
            assert sweep(store.url, older_than_s=3600.0, now=time()).removed == []
    writing.result()
    store.verify(0)


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _data: b"",
    "a few bytes": lambda data: data[:5],
    "a part of the header": lambda data: data[:200],
    "a part of the records": lambda data: data[:-30],
    "all but a byte": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_chunk_that_a_power_cut_left_empty_or_cut_is_not_published_and_is_replaced(
    store: ChunkStore, cut: str
) -> None:
    chunk = make_chunk(RECIPE, 1)
    for number in range(3):
        store.publish(make_chunk(RECIPE, number))
    left = CUTS[cut](path_of(store, 1).read_bytes())
    path_of(store, 1).write_bytes(left)
    assert store.published() == {0, 2}
    assert store.listing() == ({0, 2}, {1})
    assert (store.is_whole(0), store.is_whole(1)) == (True, False)
    assert not store.publish(chunk).duplicate
    assert store.published() == {0, 1, 2}
    assert_rows(store.fetch(1), chunk, [0, 1, 2, 3])
    (quarantined,) = (Path(store.url) / store.folder / "quarantine").iterdir()
    assert quarantined.read_bytes() == left
    assert store.publish(chunk).duplicate


def make_no_file(path: Path, kind: str) -> None:
    """Put something that is no file, and that none of our writers puts, in the place of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "directory":
            (path / "inside").mkdir(parents=True)
        case "link to nothing":
            path.symlink_to(path.with_name("nothing"))
        case "link to a device":
            path.symlink_to("/dev/zero")


NO_FILES = ("pipe", "directory", "link to nothing", "link to a device")


@pytest.mark.timeout(30, method="thread")  # whoever opens a pipe waits for a writer
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_a_damaged_chunk_by_name_is_never_waited_for_and_is_replaced(
    store: ChunkStore, kind: str
) -> None:
    chunk = make_chunk(RECIPE, 0)
    store.publish(chunk)
    reader = ChunkStore(store.url, RECIPE)
    assert_rows(reader.fetch_rows(0, [1]), chunk, [1])  # it knows the index
    make_no_file(path_of(store, 0), kind)
    for fetch in (
        partial(store.fetch, 0),
        partial(store.fetch_rows, 0, [1]),
        partial(reader.fetch_rows, 0, [1]),
    ):
        with pytest.raises(
            ChunkError,
            match=r"chunk 0 is damaged: .*0000000000\.safetensors is (no file|a link to nothing)",
        ):
            fetch()
    assert store.exists(0)
    assert not store.is_whole(0)
    assert 0 not in store.published()
    assert store.quarantine(0)
    assert not store.exists(0)
    assert not store.publish(chunk).duplicate
    assert_rows(reader.fetch_rows(0, [1]), chunk, [1])


@pytest.mark.timeout(30, method="thread")
@pytest.mark.parametrize("kind", NO_FILES)
def test_a_publisher_moves_what_is_no_file_out_of_its_chunks_way(
    store: ChunkStore, kind: str
) -> None:
    make_no_file(path_of(store, 0), kind)
    assert not store.publish(make_chunk(RECIPE, 0)).duplicate
    store.verify(0)
    (moved,) = (path_of(store, 0).parents[1] / "quarantine").iterdir()
    assert moved.name.startswith("0000000000-")
    assert os.path.lexists(moved)


def test_a_chunk_that_is_a_link_to_a_file_is_read(store: ChunkStore) -> None:
    store.publish(make_chunk(RECIPE, 0))
    elsewhere = Path(store.url) / "elsewhere"
    path_of(store, 0).rename(elsewhere)
    path_of(store, 0).symlink_to(elsewhere)
    store.verify(0)
    assert store.published() == {0}
    assert store.publish(make_chunk(RECIPE, 0)).duplicate


def test_a_recipe_that_a_power_cut_left_empty_is_published_anew(store: ChunkStore) -> None:
    store.publish(make_chunk(RECIPE, 0))
    path = Path(store.url) / store.folder / "recipe.json"
    path.write_bytes(b"")
    ChunkStore.create(store.url, RECIPE)
    assert path.read_bytes() == RECIPE.canonical_json()
    assert store.published() == {0}


BIG = small_recipe(num_sequences=4000, sequence_length=1024, chunk_sequences=8)
# one import of torch for all the processes below
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["helpers.chunks"])


def publish_until_killed(store: ChunkStore, chunk: Chunk, started: Connection) -> None:
    for number in range(BIG.num_chunks):
        started.send(number)
        store.publish(replace(chunk, number=number))


def test_a_writer_killed_at_any_moment_leaves_whole_chunks_or_none(tmp_path: Path) -> None:
    chunk = make_chunk(BIG)
    for round_number in range(8):
        store = ChunkStore.create(str(tmp_path / str(round_number)), BIG)
        here, there = FORKING.Pipe(duplex=False)
        writer = FORKING.Process(target=publish_until_killed, args=(store, chunk, there))
        writer.start()
        there.close()
        while here.recv() < 2 + round_number:
            pass
        writer.kill()
        writer.join()
        last_started = 2 + round_number
        while here.poll():
            try:
                last_started = here.recv()
            except EOFError:
                break
        published = store.published()
        assert set(range(last_started)) <= published <= set(range(last_started + 1))
        for number in published:
            assert_rows(store.fetch(number), chunk, list(range(8)))
        assert not store.publish(replace(chunk, number=last_started + 1)).duplicate


def publish_on_a_full_disk(url: str, told: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        ChunkStore(url, RECIPE).publish(make_chunk(RECIPE))
    except StoreUnavailable as error:
        told.send(str(error))


def test_a_full_store_says_so_and_keeps_no_part_of_the_chunk(store: ChunkStore) -> None:
    here, there = FORKING.Pipe(duplex=False)
    writer = FORKING.Process(target=publish_on_a_full_disk, args=(store.url, there))
    writer.start()
    there.close()
    told = here.recv()
    writer.join()
    assert told.startswith(
        f"cannot write {store.key(0)} in {store.url}: the disk is full, or the quota spent: free "
        "some space"
    )
    assert not store.exists(0)
    assert not store.publish(make_chunk(RECIPE, 0)).duplicate


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (
            GenericError("Generic LocalFileSystem error: No space left on device (os error 28)"),
            StoreUnavailable,
            "disk is full",
        ),
        (
            GenericError("Generic LocalFileSystem error: Disk quota exceeded (os error 122)"),
            StoreUnavailable,
            "quota",
        ),
        (OSError("Permission denied (os error 13)"), StoreForbidden, "permission denied"),
        (OSError("Read-only file system (os error 30)"), StoreForbidden, "permission denied"),
        (PermissionDeniedError("403 Forbidden"), StoreForbidden, "credentials and their rights"),
        (FileNotFoundError("<Code>NoSuchBucket</Code>"), StoreError, "no such bucket"),
        (GenericError("Received redirect without LOCATION"), StoreError, "set AWS_REGION"),
        (
            GenericError("Error performing PUT http://169.254.169.254/latest/api/token"),
            StoreError,
            "no credentials were found",
        ),
        (GenericError("HTTP error: error sending request"), StoreUnavailable, "cannot be reached"),
        (
            GenericError("HTTP error: request or response body error"),
            StoreUnavailable,
            "cannot be reached",
        ),
        (
            PreconditionError("412 Precondition Failed"),
            StoreUnavailable,
            "replaced while it was read",
        ),
        (
            GenericError("Server returned non-2xx status code: 503 Slow Down"),
            StoreUnavailable,
            "too busy",
        ),
        (GenericError("an oddity\n\nDebug source: many lines"), StoreError, r"\(an oddity\)$"),
    ],
)
def test_a_failure_of_the_store_says_what_to_do(
    error: Exception, kind: type[StoreError], advice: str
) -> None:
    found = explain(error, doing="write a", url="s3://bucket")
    assert type(found) is kind
    with pytest.raises(kind, match=advice):
        raise found


def test_a_root_that_cannot_be_made_or_written_is_refused_for_what_it_is(tmp_path: Path) -> None:
    for look in (ChunkStore.create, lambda url, recipe: ChunkStore(url, recipe).published()):
        with pytest.raises(
            StoreError,
            match=r"in /proc/nothing: no directory can be made there: choose another place",
        ):
            look("/proc/nothing", RECIPE)
    (tmp_path / "store").mkdir()
    with (
        read_only(tmp_path / "store", at=tmp_path / "seen") as seen,
        pytest.raises(StoreForbidden, match="permission denied"),
    ):
        ChunkStore.create(str(seen / "new"), RECIPE)


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StoreError, match="something else is in its place, or in that of a directory above it"
    ):
        ChunkStore.create(str(tmp_path / "file"), RECIPE)


def test_chunks_of_format_2_are_spread_over_prefixes_and_those_of_format_1_are_not(
    tmp_path: Path,
) -> None:
    recipe = small_recipe(format=2)
    store = ChunkStore.create(str(tmp_path), recipe)
    for number in range(3):
        store.publish(make_chunk(recipe, number))
    spread = {
        number: xxhash.xxh3_64_hexdigest(f"{number:010d}".encode())[:2] for number in range(3)
    }
    assert {number: store.key(number) for number in range(3)} == {
        number: f"{store.folder}/chunks/{two}/{number:010d}.safetensors"
        for number, two in spread.items()
    }
    assert store.published() == {0, 1, 2}
    assert [each.problem for each in verify_store(str(tmp_path))] == [None] * 4
    (listed,) = list_recipes(str(tmp_path))
    assert listed.num_chunks == 3

    # a chunk at the place of the other format is none
    for version, place in ((1, f"{spread[0]}/"), (2, ""), (2, "zz/"), (2, "00/")):
        key = f"{store.folder}/chunks/{place}0000000000.safetensors"
        assert number_of(key, version) is None
