"""A label says which run filled a recipe's store, once and for people: the runs of a store are
listed, and one that is broken is a line and no error."""

import json
import os
from pathlib import Path

import pytest

from helpers.chunks import make_chunk, small_recipe
from helpers.command import stillhouse
from helpers.sealing import canonical
from stillhouse.store import ChunkStore, sweep, verify_store
from stillhouse.store.labels import Label, labels_of, moment, put_label

LABEL = Label(
    run="demo-18c",
    created="2026-11-29T08:00:00Z",
    names={"dataset": "~/data/a.jsonl", "teacher": "/models/big", "student": "org/small"},
)


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    store = ChunkStore.create(str(tmp_path / "store"), small_recipe(format=2))
    store.publish(make_chunk(store.recipe, 0))
    return store


def label(number: int) -> Label:
    return Label(run=f"run-{number}", created=moment(1e9 + 60 * number), names={"teacher": "t"})


def path_of(store: ChunkStore, run: str) -> Path:
    return Path(store.url) / store.folder / "labels" / f"{run}.json"


@pytest.mark.parametrize("version", [1, 2])
def test_a_label_is_found_as_it_was_put_and_is_never_changed(tmp_path: Path, version: int) -> None:
    store = ChunkStore.create(str(tmp_path), small_recipe(format=version))
    assert labels_of(store) == ([], [], 0)
    assert put_label(store, LABEL)
    data = path_of(store, LABEL.run).read_bytes()
    assert data == canonical(
        {"created": LABEL.created, "names": LABEL.names, "run": LABEL.run, "version": 1}
    )
    assert not put_label(store, Label(run=LABEL.run, created=moment(0), names={}))
    assert path_of(store, LABEL.run).read_bytes() == data
    assert labels_of(store) == ([LABEL], [], 0)


def test_the_newest_run_comes_last_and_older_ones_are_counted(store: ChunkStore) -> None:
    put_in_turn(store, label(2), label(0), label(3), label(1))
    assert labels_of(store).labels == [label(number) for number in range(4)]
    newest = labels_of(store, most=3)
    assert newest.labels == [label(number) for number in (0, 1, 3)]  # those that were put last
    assert newest.num_older == 1


def put_in_turn(store: ChunkStore, *labels: Label) -> None:
    """Each an hour after the one before."""
    for hour, each in enumerate(labels):
        put_label(store, each)
        os.utime(path_of(store, each.run), (3600 * hour, 3600 * hour))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"created": "2026-11-29 08:00"},
        {"created": "2026-1-9T08:00:00Z"},
        {"created": 1},
        {"names": ["teacher"]},
        {"names": {"teacher": 1}},
        {"run": "another"},
        {"run": "../another"},
        {"more": 1},
    ],
)
def test_what_is_no_label_is_broken_and_hides_no_other(
    store: ChunkStore, change: dict[str, object]
) -> None:
    put_label(store, LABEL)
    values = json.loads(path_of(store, LABEL.run).read_bytes())
    path_of(store, "b").write_bytes(canonical({**values, "run": "b"}))
    assert labels_of(store).broken == []
    path_of(store, "b").write_bytes(canonical({**values, "run": "b", **change}))
    assert labels_of(store) == ([LABEL], [f"{store.folder}/labels/b.json"], 0)


def test_a_broken_label_is_a_line_of_ls_and_stat(store: ChunkStore) -> None:
    put_label(store, LABEL)
    data = path_of(store, LABEL.run).read_bytes()
    for name, broken in (
        ("cut", data.replace(b"demo-18c", b"cut")[:-1]),
        ("spaced", data.replace(b"demo-18c", b"spaced") + b"\n"),
        ("large", canonical({**json.loads(data), "run": "large", "names": {"x": "y" * 70_000}})),
        ("nested", b"[" * 50_000),
    ):
        path_of(store, name).write_bytes(broken)
    for verb in ("ls", "stat"):
        outcome = stillhouse("store", verb, store.url)
        assert outcome.code == 0
        assert LABEL.run in outcome.out
        for name in ("cut", "spaced", "large", "nested"):
            assert f"{store.folder}/labels/{name}.json is no label" in outcome.out


def test_labels_are_no_chunks_and_no_leftovers(store: ChunkStore) -> None:
    put_label(store, LABEL)
    path_of(store, "broken").write_bytes(b"{}")
    left = path_of(store, "demo").with_name("demo.json#1")
    left.write_bytes(b"half a label")
    assert store.published() == {0}
    assert [finding.problem for finding in verify_store(store.url)] == [None, None]
    swept = sweep(store.url, older_than_s=0.0, now=left.stat().st_mtime + 1)
    assert swept == ([str(left)], [])
    assert path_of(store, LABEL.run).exists()


def test_ls_lists_the_newest_runs_of_each_recipe_and_stat_all_of_one(store: ChunkStore) -> None:
    bare = stillhouse("store", "ls", store.url).out
    put_in_turn(store, LABEL, *map(label, range(3)))
    lines = stillhouse("store", "ls", store.url).out.splitlines()
    assert lines[: len(bare.splitlines())] == bare.splitlines()
    runs = [line.split() for line in lines if line.startswith(f" {store.folder}")][1:]
    assert runs == [
        [store.folder, "2001-09-09", f"01:{46 + number}", "t", f"run-{number}"]
        for number in range(3)
    ]
    assert f"1 older runs of {store.folder}" in lines[-1]
    shown = stillhouse("store", "stat", store.url).out
    assert shown.index("run-2, begun") < shown.index("demo-18c, begun 2026-11-29T08:00:00Z: ")
    assert "student org/small, teacher /models/big" in shown


def test_ls_names_the_teacher_and_the_data_set(store: ChunkStore) -> None:
    put_label(store, LABEL)
    *_, heading, line = stillhouse("store", "ls", store.url).out.splitlines()
    assert heading.split() == ["recipe", "begun", "(UTC)", "teacher", "data", "set", "run"]
    assert line.split() == [store.folder, "2026-11-29", "08:00", "big", "a.jsonl", "demo-18c"]
