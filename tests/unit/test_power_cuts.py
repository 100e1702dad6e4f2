"""A power cut at any moment: what was reported is there afterwards, and what is not whole is made
again.

A sequence of real writes (chunks, a consumer's progress, checkpoints of two ranks, a journal) is
recorded call by call. Every prefix of the record is laid out again without the writes that were not
synced. Then each kind of sync is left out once, which the checks have to detect.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest

from helpers.calls import must_not_be_called
from helpers.checkpoints import ORIGIN, snapshot_of
from helpers.chunks import make_chunk, small_recipe
from helpers.powercut import After, Recorder, Unsynced, power_cuts
from stillhouse import atomic
from stillhouse.checkpoint.choice import newest
from stillhouse.checkpoint.integrity import verify
from stillhouse.checkpoint.manifest import Commit, part_of
from stillhouse.checkpoint.writer import CheckpointWriter
from stillhouse.errors import StillhouseError
from stillhouse.store import ChunkStore, Consumer
from stillhouse.store.consumers import commit, join, registered
from stillhouse.store.object_store import Blobs
from stillhouse.tracking import CheckpointEvent, Journal, read_journal

RECIPE = small_recipe()
CHUNKS = {number: make_chunk(RECIPE, number) for number in range(RECIPE.num_chunks)}
READER = Consumer(
    name="student",
    global_batch_sequences=2,
    seed=0,
    window_chunks=2,
    total_steps=30,
    committed_step=0,
)
STEPS = (10, 20, 30)
FOLDER = r"checkpoints/step-\d+\.a"
STORE = rf"store/{RECIPE.fingerprint[:16]}"

# What is synced, and the syncs of that kind.
KINDS = {
    "a rank's file": rf"file {FOLDER}/pp_rank_\d_optim\.pt#1",
    "a rank's part": rf"file {FOLDER}/part-\d+-of-\d+\.json#1",
    "the names in a checkpoint's folder": rf"directory {FOLDER}",
    "a manifest": r"file checkpoints/step-\d+\.json#1",
    "the names of manifests and folders": r"directory checkpoints",
    "a row of the journal": r"file run/journal\.jsonl",
    "the journal's name": r"directory run",
    "a chunk": rf"file {STORE}/chunks/\d+\.safetensors#1",
    "the names of chunks": rf"directory {STORE}/chunks",
    "the recipe": rf"file {STORE}/recipe\.json#1",
    "the names in a recipe's folder": rf"directory {STORE}",
    "the recipes' names": r"directory store",
    "a reader's progress": rf"file {STORE}/readers/student\.json#1",
    "the readers' names": rf"directory {STORE}/readers",
    "the names of store, checkpoints and run": r"directory \.",
}


def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 30
    while not condition():
        assert monotonic() < deadline, "not within its time"
        sleep(0.001)


def record_course(root: Path, layer: Recorder, *, rank_1: Recorder | None = None) -> None:
    """Three chunks, and three checkpoints of two ranks of which two are kept; what is reported is
    told to the layer at once."""
    atomic.make_directory(root / "run", files=layer)
    journal = Journal(root / "run" / "journal.jsonl", clock=lambda: 1.0, files=layer)
    store = ChunkStore.create(Blobs(str(root / "store"), files=layer), RECIPE)
    join(store, READER)
    layer.tell("reader", 0)
    for number, chunk in CHUNKS.items():
        store.publish(chunk)
        layer.tell("chunk", number)

    def on_commit(made: Commit, _seconds: float, _blocking_s: float) -> None:
        layer.tell("commit", made.step)
        journal.record(CheckpointEvent("student", made.step, 1.0, made.num_bytes))
        layer.tell("row", made.step)
        commit(store, replace(READER, committed_step=made.step))
        layer.tell("reader", made.step)

    checkpoints = root / "checkpoints"
    ranks = [
        CheckpointWriter(
            str(checkpoints),
            origin=ORIGIN,
            attempt="a",
            rank=rank,
            world_size=2,
            keep=2,
            on_commit=on_commit,
            on_delay=must_not_be_called,
            files=files,
        )
        for rank, files in enumerate((layer, rank_1 or layer))
    ]
    for step in STEPS:
        ranks[0].submit(snapshot_of(step))
        # rank 1 is the last to write
        until((checkpoints / f"step-{step:08d}.a" / part_of(0, 2)).exists)
        ranks[1].submit(snapshot_of(step, rank=1))
        assert all(rank.wait() for rank in ranks)


def require_promises(root: Path, told: list[tuple[str, int]]) -> None:
    """Raise AssertionError, or an error of ours, where something that was reported is gone, or
    nobody can go on from what is left."""
    step = require_commits(Blobs(str(root / "checkpoints")), told)
    rows = [
        row.step
        for row in read_journal(root / "run" / "journal.jsonl")
        if isinstance(row, CheckpointEvent)
    ]
    assert len(rows) >= sum(kind == "row" for kind, _ in told), "a row that was recorded is gone"
    assert step >= max(rows, default=0), "the journal tells of a commit that is gone"
    if any(kind == "reader" for kind, _ in told):
        require_store(str(root / "store"), told, newest_step=step)


def require_commits(blobs: Blobs, told: list[tuple[str, int]]) -> int:
    """The step of the newest commit."""
    found = newest(blobs.url)
    step = found.step if found is not None else 0
    assert step >= max((number for kind, number in told if kind == "commit"), default=0), (
        "a commit that was reported is gone"
    )
    for name in blobs.names():
        values = json.loads(bytes(blobs.read(name)))["commit"]
        files = {file: (size, digest) for file, (size, digest) in values["files"].items()}
        assert (
            verify(blobs, Commit(values["step"], values["attempt"], 2, ORIGIN, files), files) == ""
        ), "a manifest outlasted its files"
    return step


def require_store(url: str, told: list[tuple[str, int]], *, newest_step: int) -> None:
    recipe = Path(url) / RECIPE.fingerprint[:16] / "recipe.json"
    assert recipe.is_file(), "the recipe is gone"
    assert recipe.read_bytes() == RECIPE.canonical_json(), "the recipe is cut"
    store = ChunkStore(url, RECIPE)
    there = store.published()
    assert there >= {number for kind, number in told if kind == "chunk"}, (
        "a chunk that was published is gone"
    )
    consumers, unknown = registered(store)
    assert not unknown, "a consumer's progress is cut"
    assert consumers, "a consumer is gone"
    assert consumers[0].committed_step >= max(
        number for kind, number in told if kind == "reader"
    ), "a consumer's progress is gone"
    assert consumers[0].committed_step <= newest_step, (
        "a consumer is past the newest commit: what it needs again may be deleted"
    )
    for number in there:
        store.verify(number)


def make_the_rest(url: str) -> None:
    """The chunks that a run would make which goes on from here."""
    store = ChunkStore.create(Blobs(url, files=Unsynced()), RECIPE)
    for number in set(CHUNKS) - store.published():
        assert not store.publish(CHUNKS[number]).duplicate, "what is no chunk was taken for one"
    for number in CHUNKS:
        store.verify(number)


def first_broken(layer: Recorder, folder: Path) -> str:
    """What the first power cut that breaks a promise breaks, or ''. In between the store is filled
    up, as by the run that goes on."""
    after = After(folder / "after")
    num_chunks = 0
    for remains, told in power_cuts(layer.record):
        after.becomes(remains)
        try:
            require_promises(after.root, told)
            if num_chunks < sum(kind == "chunk" for kind, _ in told):
                num_chunks += 1
                make_the_rest(str(after.root / "store"))
                after.clear()
        except (AssertionError, StillhouseError) as error:
            return f"after {told[-1:]}: {error}"
    return ""


@pytest.fixture
def course(tmp_path: Path) -> Path:
    (tmp_path / "course").mkdir()
    return tmp_path / "course"


def test_after_a_power_cut_at_any_moment_what_was_reported_is_there(
    course: Path, tmp_path: Path
) -> None:
    layer = Recorder(course)
    record_course(course, layer)
    assert first_broken(layer, tmp_path) == ""
    assert {
        kind: sync for kind in KINDS for sync in layer.syncs if re.fullmatch(KINDS[kind], sync)
    }.keys() == KINDS.keys()
    assert [
        sync
        for sync in layer.syncs
        if not any(re.fullmatch(pattern, sync) for pattern in KINDS.values())
    ] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_sync_that_is_left_out_breaks_a_promise(course: Path, tmp_path: Path, kind: str) -> None:
    layer = Recorder(course, loses=KINDS[kind])
    record_course(course, layer)
    assert first_broken(layer, tmp_path) != ""


def test_rank_0_makes_sure_of_what_another_rank_has_not_synced_yet(
    course: Path, tmp_path: Path
) -> None:
    """A part can be seen before the names beside it are on disk: its rank may be about to sync
    them, or be dead."""
    layer = Recorder(course)
    record_course(course, layer, rank_1=layer.losing("directory .*"))
    assert first_broken(layer, tmp_path) == ""
