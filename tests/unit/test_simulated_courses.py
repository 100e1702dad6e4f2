"""Whatever befalls requests, disks and processes, what was told stays true; and each planted fault
is found by some course.

A course that fails is run again by `World(seed).run()`, with the seed from the assertion's message;
`World.history` says what happened.
"""

from pathlib import Path
from typing import Any

import pytest

from helpers.courses import RECIPE, Broken, Bucket, Run, World
from helpers.powercut import Recorder
from stillhouse.checkpoint.choice import Choice
from stillhouse.checkpoint.manifest import Commit, Files, publish
from stillhouse.checkpoint.snapshot import Snapshot
from stillhouse.checkpoint.writer import RankWriter
from stillhouse.store.object_store import Blobs

NUM_COURSES, NUM_POWER_CUTS = 120, 20


def broken_by(world: World) -> str:
    """The promise that a course breaks, or ''."""
    try:
        world.run()
    except Broken as error:
        return str(error)
    return ""


def folder_in(tmp_path: Path, seed: int) -> Path:
    folder = tmp_path / f"course-{seed}"
    folder.mkdir()
    return folder


def test_requests_that_are_lost_doubled_and_late_break_no_promise() -> None:
    broken = {seed: broken_by(World(seed)) for seed in range(NUM_COURSES)}
    assert {seed: problem for seed, problem in broken.items() if problem} == {}


def test_a_power_cut_in_the_middle_of_everything_breaks_no_promise(tmp_path: Path) -> None:
    broken = {
        seed: broken_by(World(seed, folder=folder_in(tmp_path, seed)))
        for seed in range(NUM_POWER_CUTS)
    }
    assert {seed: problem for seed, problem in broken.items() if problem} == {}


@pytest.mark.parametrize("seed", [7, 14, 80])
def test_a_seed_is_a_course(seed: int) -> None:
    first, second = Stalling(seed), Stalling(seed)
    assert broken_by(first) == broken_by(second) == ""
    assert first.history == second.history


class LosesSyncs(World):
    """A disk on which a kind of sync is left out."""

    def __init__(self, seed: int, *, folder: Path, loses: str) -> None:
        self._loses = loses
        super().__init__(seed, folder=folder)

    def make_recorder(self, folder: Path) -> Recorder:
        return Recorder(folder, loses=self._loses)


class CreatesOverOthers(Bucket):
    """It replaces what is there although it was asked to create; only the objects with which it is
    tried stay."""

    def put(
        self,
        _store: Any,
        path: str,
        file: bytes,
        *,
        mode: str = "overwrite",
        use_multipart: bool | None = None,
    ) -> None:
        super().put(
            _store,
            path,
            file,
            mode=mode if "/probe-" in path else "overwrite",
            use_multipart=use_multipart,
        )


class IgnoresCreateOnly(World):
    def make_bucket(self, place: str) -> Bucket:
        return CreatesOverOthers(self, place)


class DeletesFirst(RankWriter):
    """Makes room for a commit before it is one."""

    def _commit(self, made: Commit, *, began: float, blocking_s: float) -> None:
        for name in self._blobs.names():
            if name.startswith("step-") and name < made.manifest:
                self._blobs.delete(name)
        super()._commit(made, began=began, blocking_s=blocking_s)


class DeletesBeforeTheManifest(World):
    def make_writer(self, blobs: Blobs, **values: Any) -> RankWriter:
        return DeletesFirst(blobs, **values)


class AsksForNoPart(RankWriter):
    """Takes a part that is not there yet for one of a rank that has no file."""

    def _part(self, folder: str, rank: int) -> Files:
        there = {blob.key for blob in self._blobs.under(folder)}
        return (
            super()._part(folder, rank) if any(f"part-{rank:05d}" in key for key in there) else {}
        )


class CommitsBeforeAPartIsThere(World):
    def make_writer(self, blobs: Blobs, **values: Any) -> RankWriter:
        return AsksForNoPart(blobs, **values)


class TellsItsPlaceBeforeTheCheckpoint(World):
    def write(self, writer: RankWriter, snapshot: Snapshot, run: Run) -> None:
        self._tell_place(run, snapshot.step)
        super().write(writer, snapshot, run)


class Stalling(World):
    """Its actors stall often, so that more are taken for dead and live on."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.stall_rate = 0.06


class SetsAsideWhateverIsLater(Stalling):
    """A commit too that was made since the choice, and that nobody has looked at."""

    def set_aside(self, blobs: Blobs, chosen: Choice) -> None:
        step = chosen.commit.step if chosen.commit is not None else 0
        super().set_aside(
            blobs, chosen._replace(passed_over=dict.fromkeys(self._later(blobs, step), ""))
        )

    def _later(self, blobs: Blobs, step: int) -> list[str]:
        return [
            name
            for name in blobs.names()
            if name.startswith("step-") and name.endswith(".json") and int(name[5:13]) > step
        ]


class LooksForAnOwnerOnce(RankWriter):
    """Before a commit, and not after it."""

    def _commit(self, made: Commit, *, began: float, blocking_s: float) -> None:
        self._insist(self._require_owner)
        self._on_commit(
            self._insist(lambda: publish(self._blobs, made)), self._clock() - began, blocking_s
        )


class LooksForANewerOwnerTooEarly(Stalling):
    def make_writer(self, blobs: Blobs, **values: Any) -> RankWriter:
        return LooksForAnOwnerOnce(blobs, **values)


PLANTS: list[type[World]] = [
    IgnoresCreateOnly,
    DeletesBeforeTheManifest,
    CommitsBeforeAPartIsThere,
    TellsItsPlaceBeforeTheCheckpoint,
    SetsAsideWhateverIsLater,
    LooksForANewerOwnerTooEarly,
]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(plant: type[World]) -> None:
    assert any(broken_by(plant(seed)) for seed in range(400))


STORE = rf"store/{RECIPE.fingerprint[:16]}"
SYNCS = {
    "a rank's file": r"file [xy]/step-\d+\.\w+/pp_rank_\d_optim\.pt#1",
    "the names in a checkpoint's folder": r"directory [xy]/step-\d+\.\w+",
    "a manifest": r"file [xy]/step-\d+\.json#1",
    "the names of manifests": r"directory [xy]",
    "a chunk": rf"file {STORE}/chunks/\d+\.safetensors#1",
    "the names of chunks": rf"directory {STORE}/chunks",
    "a reader's place": rf"file {STORE}/readers/\w\.json#1",
    "the names of readers": rf"directory {STORE}/readers",
}


@pytest.mark.parametrize("kind", SYNCS)
def test_a_sync_that_is_left_out_is_found(tmp_path: Path, kind: str) -> None:
    def world(seed: int) -> World:
        return LosesSyncs(seed, folder=folder_in(tmp_path, seed), loses=SYNCS[kind])

    assert any(broken_by(world(seed)) for seed in range(100))
