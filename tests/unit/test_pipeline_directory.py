"""A run directory that is used again."""

from pathlib import Path

from helpers.world import TinyWorld
from stillhouse.pipeline.directory import attempt
from stillhouse.store import ChunkStore
from stillhouse.store.readers import join, registered


def test_a_run_whose_checkpoints_go_elsewhere_is_one_reader_still(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Another place of checkpoints gives another name; the store would keep every chunk for the one of before."""
    names = []
    for place in (None, tmp_path / "first", tmp_path / "second"):
        changes = {} if place is None else {"checkpoint_url": str(place)}
        made = tiny_world.plan(tmp_path / "run", store={"url": str(tmp_path / "store")}, student=changes)
        with attempt(made, "stillhouse run"):
            store = ChunkStore(made.config.store.url, made.recipe)
            join(store, made.jobs()[0].reader(0))
        names.append([reader.name for reader in registered(store).readers])
    assert [len(each) for each in names] == [1, 1, 1]
    assert len({name for each in names for name in each}) == 3
