"""The checker of histories finds every kind of broken promise, and none where all were kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.calls import must_not_be_called
from helpers.checkpoints import ORIGIN, make, snapshot_of
from helpers.chunks import make_chunk, small_recipe
from helpers.history import (
    Damaged,
    Event,
    Left,
    Published,
    Repaired,
    Resumed,
    Told,
    chunks_in,
    commits_in,
    require_kept,
    told_in,
    violations,
)
from stillhouse.checkpoint.choice import set_aside
from stillhouse.checkpoint.fence import owner_key, require_owner
from stillhouse.checkpoint.manifest import Commit
from stillhouse.checkpoint.writer import CheckpointWriter
from stillhouse.errors import CheckpointError
from stillhouse.store import ChunkStore
from stillhouse.store.object_store import Blobs
from stillhouse.tracking import (
    CheckpointEvent,
    ChunkEvent,
    DamagedEvent,
    Journal,
    RepairEvent,
    RunEvent,
    TrainEvent,
    read_journal,
)


def told(*steps: int, by: str = "a") -> list[Event]:
    return [Told("student", step, by) for step in steps]


def student(*steps: int) -> Left:
    return Left({"student": dict.fromkeys(steps, "a")})


KEPT: dict[str, tuple[list[Event], Left]] = {
    "nothing happened": ([], student()),
    "older commits were deleted": (told(10, 20, 30), student(20, 30)),
    "a commit was made and not told": ([*told(10), Resumed("student", 20), *told(30)], student(30)),
    "a later commit is there": (told(10), student(20)),
    "a group went on from what was told": (
        [*told(10, 20), Resumed("student", 20), *told(30)],
        student(30),
    ),
    "a damaged commit was passed over with words": (
        [*told(10, 20), Damaged("student", 20), Resumed("student", 10), *told(20)],
        student(10, 20),
    ),
    "two roles have steps of their own": (
        [*told(20), Told("control", 10)],
        Left({"student": {20: ""}, "control": {10: ""}}),
    ),
    "a chunk was repaired": (
        [Published(1, content="x"), Repaired(1), Published(1, content="y")],
        Left(chunks={1: "y"}),
    ),
    "chunks are there that nobody told of": ([Published(1)], Left(chunks={1: "x", 2: "y"})),
}

BROKEN: dict[str, tuple[list[Event], Left, str]] = {
    "a commit that was told is lost": (
        told(10, 20),
        student(10),
        "step 20 was told committed, and the newest commit at the end is of step 10",
    ),
    "all commits are lost": (
        told(10),
        student(),
        "step 10 was told committed, and the newest commit at the end is of step 0",
    ),
    "a group went on from an older commit": (
        [*told(10, 20), Resumed("student", 10)],
        student(10, 20),
        "step 20 was told committed, and the commit of step 10 was read after that",
    ),
    "a command found no commit where one was told": (
        [*told(10), Resumed("student", 0)],
        student(10),
        "step 10 was told committed, and the commit of step 0 was read after that",
    ),
    "an older commit was told after a newer one": (
        told(20, 10),
        student(10, 20),
        "step 10 was told committed after step 20",
    ),
    "one step was committed twice by two owners": (
        [*told(10, by="first"), *told(10, by="second")],
        student(10),
        "step 10 was told committed twice, by first and by second",
    ),
    "one step was committed with two contents": (
        [Told("student", 10, "first", "a"), Told("student", 10, "second", "b")],
        student(10),
        "step 10 was told committed as a and as b",
    ),
    "another commit stands at the end than was told": (
        [Told("student", 10, "second", "b")],
        student(10),
        "step 10 was told committed as b, and is a at the end",
    ),
    "the one before a damaged commit is lost": (
        [*told(10, 20), Damaged("student", 20)],
        student(),
        "step 10 was told committed, and the newest commit at the end is of step 0",
    ),
    "a chunk was published twice": (
        [Published(1, "a"), Published(1, "b")],
        Left(),
        "chunk 1 was published twice, by a and by b",
    ),
    "one name had two different bytes": (
        [Published(1, content="x"), Published(1, content="y")],
        Left(),
        "chunk 1 was published as x and as y",
    ),
    "a chunk's bytes changed": (
        [Published(1, content="x")],
        Left(chunks={1: "y"}),
        "chunk 1 was published as x, and is y at the end",
    ),
    "a chunk is gone": (
        [Published(1, "a")],
        Left(chunks={}),
        "chunk 1 was published by a, and is gone at the end",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_history_in_which_all_promises_were_kept_has_no_violation(case: str) -> None:
    events, left = KEPT[case]
    assert violations(events, left) == []


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_promise_is_named(case: str) -> None:
    events, left, words = BROKEN[case]
    assert any(words in each for each in violations(events, left))


def train(*steps: int) -> list[RunEvent]:
    return [
        TrainEvent("student", step, 1.0, 1.0, None, 1.0, 1e-3, 8, 1.0, 0.0, 8.0) for step in steps
    ]


def test_a_journal_tells_where_each_group_began_and_what_came_of_it() -> None:
    commit, damaged = (
        CheckpointEvent("student", 2, 1.0, 8),
        DamagedEvent("student", "step-00000002.json: model.pt is missing"),
    )
    chunks = [ChunkEvent(5, 8, 8, 1.0, 3, 0.9, 0.0, 0.0, duplicate) for duplicate in (False, True)]
    rows = [*train(1, 2), commit, *train(3, 4), *train(3), damaged, *chunks, RepairEvent(5)]
    assert [*told_in(rows, train(3))] == [
        Resumed("student", 0),
        Told("student", 2, "journal 1"),
        Resumed("student", 2),
        Damaged("student", 2),
        Published(5, "journal 1, replica 3"),
        Repaired(5),
        Resumed("student", 2),
    ]


def test_what_is_left_of_checkpoints_and_chunks_is_what_verifies(tmp_path: Path) -> None:
    make(tmp_path / "commits", 10, 20, 30)
    (tmp_path / "commits" / "step-00000020.a" / "model_states.bin").write_bytes(b"")
    assert commits_in(str(tmp_path / "commits")) == {10: "a", 30: "a"}
    store = ChunkStore.create(str(tmp_path / "store"), small_recipe())
    store.publish(make_chunk(store.recipe, 1))
    before = chunks_in(store)
    assert before.keys() == {1}
    store.delete(1)
    store.publish(make_chunk(store.recipe, 1, seed=1))
    assert chunks_in(store).keys() == {1}
    assert chunks_in(store) != before


def commit_steps(
    url: str, journal: Path, *, attempt: str, require: Callable[[], None]
) -> CheckpointWriter:
    """Ten commits of one command, as a rank makes and journals them."""

    def on_commit(made: Commit, seconds: float, _blocking_s: float) -> None:
        Journal(journal).record(CheckpointEvent("student", made.step, seconds, made.num_bytes))

    only: dict[str, Any] = {
        "origin": ORIGIN,
        "attempt": attempt,
        "rank": 0,
        "world_size": 1,
        "keep": 20,
        "require_owner": require,
    }
    with CheckpointWriter(url, **only, on_commit=on_commit, on_delay=must_not_be_called) as writer:
        for step in range(1, 11):
            writer.submit(snapshot_of(step))
        writer.wait()
    return writer


def test_two_commands_that_both_commit_in_one_place_are_found_for_each_of_their_commits(
    tmp_path: Path,
) -> None:
    """Neither asks who owns the place: all ten steps are told twice, and what stands are the first
    one's weights."""
    url, journal = str(tmp_path / "commits"), tmp_path / "journal.jsonl"
    for attempt in ("first", "second"):
        commit_steps(url, journal, attempt=attempt, require=lambda: None)
    rows = read_journal(journal)
    broken = violations(told_in(rows), Left({"student": commits_in(url)}))
    assert sum("was told committed twice" in each for each in broken) == 10
    with pytest.raises(AssertionError, match="step 10 was told committed twice"):
        require_kept(rows, checkpoints={"student": url})


def test_of_two_commands_that_ask_who_owns_the_place_one_commits_and_the_history_is_kept(
    tmp_path: Path,
) -> None:
    url, journal = str(tmp_path / "commits"), tmp_path / "journal.jsonl"
    blobs = Blobs(url)
    blobs.create(owner_key(2), b"")
    with pytest.raises(CheckpointError, match="belong to another command now"):
        commit_steps(url, journal, attempt="first", require=lambda: require_owner(blobs, 1))
    commit_steps(url, journal, attempt="second", require=lambda: require_owner(blobs, 2))
    require_kept(read_journal(journal), checkpoints={"student": url})


def test_a_commit_that_was_set_aside_without_a_word_is_found(tmp_path: Path) -> None:
    url = str(tmp_path)
    make(url, 10, 20)
    rows = [CheckpointEvent("student", step, 1.0, 8) for step in (10, 20)]
    require_kept(rows, checkpoints={"student": url})
    set_aside(Blobs(url), ["step-00000020.json"])
    with pytest.raises(AssertionError, match="the newest commit at the end is of step 10"):
        require_kept(rows, checkpoints={"student": url})
