"""Consumers of a store: every process that opens it finds them and their committed progress, and a
record that it does not understand is reported."""

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.chunks import small_recipe
from stillhouse.errors import StoreError
from stillhouse.store import ChunkStore, Consumer
from stillhouse.store.consumers import commit, consumer_name, join, leave, registered

CONSUMER = Consumer(
    name="a-student",
    global_batch_sequences=8,
    seed=3,
    window_chunks=4,
    total_steps=100,
    committed_step=0,
)


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore.create(str(tmp_path / "store"), small_recipe())


def test_what_a_consumer_commits_is_what_others_find(store: ChunkStore) -> None:
    join(store, CONSUMER)
    join(store, replace(CONSUMER, name="b"))
    commit(store, replace(CONSUMER, committed_step=40))
    elsewhere = ChunkStore(store.url, store.recipe)
    assert registered(elsewhere) == (
        [replace(CONSUMER, committed_step=40), replace(CONSUMER, name="b")],
        [],
    )
    commit(store, replace(CONSUMER, committed_step=20))
    assert registered(elsewhere).consumers[0].committed_step == 20


def test_joining_again_keeps_the_committed_step(store: ChunkStore) -> None:
    commit(store, replace(CONSUMER, committed_step=40))
    join(store, CONSUMER)
    assert registered(store).consumers == [replace(CONSUMER, committed_step=40)]


def test_joining_again_takes_over_more_steps(store: ChunkStore) -> None:
    commit(store, replace(CONSUMER, committed_step=100))
    join(store, replace(CONSUMER, total_steps=300))
    assert registered(store).consumers == [replace(CONSUMER, committed_step=100, total_steps=300)]


def test_a_consumer_that_left_is_not_registered(store: ChunkStore) -> None:
    join(store, CONSUMER)
    leave(store, CONSUMER.name)
    leave(store, CONSUMER.name)
    assert registered(store).consumers == []


def test_a_store_without_consumers_has_none(store: ChunkStore) -> None:
    assert registered(store) == ([], [])


def record(store: ChunkStore) -> Path:
    return Path(store.url) / store.folder / "readers" / "a-student.json"


def test_the_record_is_canonical_json(store: ChunkStore) -> None:
    join(store, CONSUMER)
    assert record(store).read_bytes() == (
        b'{"committed_step":0,"global_batch_sequences":8,"name":"a-student","seed":3,"total_steps":100,"version":1,"window_chunks":4,'
        b'"xxh3":"71ffabcfbc50a5d6"}'
    )


@pytest.mark.parametrize(
    "change",
    [
        (b'"version":1', b'"version":2'),
        (b'"seed":3', b'"seed":"3"'),
        (b'"seed":3', b'"seed":true'),
        (b'"seed":3,', b""),
        (b'"seed":3,', b'"seed":3,"order":"other",'),
        (b'"name":"a-student"', b'"name":"another"'),
        (b"}", b""),
        (b'"committed_step":0', b'"committed_step":8'),
        (b'{"committed_step":0', b'[{"committed_step":0'),
    ],
)
def test_a_record_that_is_not_understood_is_reported_by_its_key(
    store: ChunkStore, change: tuple[bytes, bytes]
) -> None:
    join(store, CONSUMER)
    data = record(store).read_bytes()
    assert change[0] in data
    record(store).write_bytes(data.replace(*change))
    assert registered(store) == ([], [f"{store.folder}/readers/a-student.json"])


def test_runs_with_different_places_have_different_names_that_can_be_keys(
    store: ChunkStore,
) -> None:
    names = [
        consumer_name(place, role)
        for place in ("/runs/a b", "s3://runs/a b", "/runs/é", "/")
        for role in ("student", "control")
    ]
    assert len(set(names)) == 8
    assert names[0] == consumer_name("/runs/a b", "student")
    for name in names:
        join(store, replace(CONSUMER, name=name))
    assert len(registered(store).consumers) == 8
    with pytest.raises(StoreError, match=r"cannot be called '\.\./x'"):
        join(store, replace(CONSUMER, name="../x"))


def test_a_run_in_a_hidden_directory_has_a_name_that_can_be_registered(store: ChunkStore) -> None:
    for place in ("/runs/.distil", "/runs/..."):
        hidden = replace(CONSUMER, name=consumer_name(place, "student"))
        join(store, hidden)
        assert hidden in registered(store).consumers
