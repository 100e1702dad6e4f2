"""A teacher keeps the chunk that it has made while the store cannot take it: nothing is dropped, and nothing is made twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.chunks import make_chunk, small_recipe
from stillhouse.errors import StoreError
from stillhouse.store import Chunk, ChunkRef, ChunkStore, StoreUnavailable
from stillhouse.teacher.actor import publish_when_possible

RECIPE = small_recipe()


class RefusingStore(ChunkStore):
    """A store that raises what it is given to, and then takes chunks."""

    refusals: Iterator[StoreError] = iter(())

    def publish(self, chunk: Chunk) -> ChunkRef:
        error = next(self.refusals, None)
        if error is not None:
            raise error
        return super().publish(chunk)


@pytest.fixture
def store(tmp_path: Path) -> RefusingStore:
    return RefusingStore(str(tmp_path / "store"), RECIPE)


def test_a_full_store_is_waited_for(store: RefusingStore):
    store.refusals = iter([StoreUnavailable("the disk is full")])
    ref = publish_when_possible(store, make_chunk(RECIPE, 1), patience_s=60)
    assert (ref.number, ref.duplicate) == (1, False)
    assert store.published() == {1}


def test_patience_ends_with_what_the_store_said(store: RefusingStore):
    store.refusals = iter([StoreUnavailable("the disk is full"), StoreUnavailable("never asked again")])
    with pytest.raises(StoreUnavailable, match="the disk is full"):
        publish_when_possible(store, make_chunk(RECIPE, 1), patience_s=0)
    assert store.published() == set()


def test_a_store_that_forbids_is_not_waited_for(store: RefusingStore):
    store.refusals = iter([StoreError("permission denied")])
    with pytest.raises(StoreError, match="permission denied"):
        publish_when_possible(store, make_chunk(RECIPE, 1), patience_s=60)
