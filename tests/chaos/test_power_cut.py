"""The power of a real ext4 file system is cut: what was reported before is on its disk."""

from pathlib import Path

import pytest

from helpers.calls import must_not_be_called
from helpers.checkpoints import ORIGIN, snapshot_of
from helpers.chunks import make_chunk, small_recipe
from helpers.damage import cut_power, file_system_in
from helpers.history import require_kept
from stillhouse.checkpoint.choice import newest
from stillhouse.checkpoint.manifest import Commit
from stillhouse.checkpoint.writer import CheckpointWriter
from stillhouse.store import ChunkStore
from stillhouse.tracking import CheckpointEvent, Journal, read_journal

RECIPE = small_recipe()
STEPS = [10, 20, 30, 40, 50, 60]


def publish_and_commit(root: Path) -> None:
    """Every chunk, and checkpoints of which two are kept, journalled as they are committed."""
    store = ChunkStore.create(str(root / "store"), RECIPE)
    for number in range(RECIPE.num_chunks):
        store.publish(make_chunk(RECIPE, number))
    journal = Journal(root / "journal.jsonl")

    def on_commit(made: Commit, seconds: float, _blocking_s: float) -> None:
        journal.record(CheckpointEvent("student", made.step, seconds, made.num_bytes))

    with CheckpointWriter(
        str(root / "checkpoints"),
        origin=ORIGIN,
        attempt="a",
        rank=0,
        world_size=1,
        keep=2,
        on_commit=on_commit,
        on_delay=must_not_be_called,
    ) as writer:
        for step in STEPS:
            writer.submit(snapshot_of(step, num_floats=50_000))
        assert writer.wait()


@pytest.mark.machine_root
def test_what_was_reported_before_the_power_was_cut_is_on_the_disk(tmp_path: Path) -> None:
    image, left = tmp_path / "image", tmp_path / "left"
    with file_system_in(image, tmp_path / "disk") as disk:
        publish_and_commit(disk)
        cut_power(image, left)
    with file_system_in(left, tmp_path / "after") as root:
        events = read_journal(root / "journal.jsonl")
        found = newest(str(root / "checkpoints"))
        assert [event.step for event in events if isinstance(event, CheckpointEvent)] == STEPS
        assert found is not None
        assert found.step == STEPS[-1]
        store = ChunkStore(str(root / "store"), RECIPE)
        assert store.published() == set(range(RECIPE.num_chunks))
        for number in range(RECIPE.num_chunks):
            store.verify(number)
        require_kept(events, checkpoints={"student": str(root / "checkpoints")}, store=store)
