"""A teacher's chunk holds the records of all its targets, measured; it is kept while the store
cannot take it, and never made twice."""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch

from helpers.calls import must_not_be_called
from helpers.chunks import make_chunk, small_recipe
from stillhouse.engines.base import encoded
from stillhouse.errors import ChunkError, StoreError
from stillhouse.logits import (
    CompressedLogits,
    TargetSpec,
    compress,
    concatenate,
    decode,
    encode,
    fidelity,
)
from stillhouse.pool.worker_process import is_there
from stillhouse.retry import Patience
from stillhouse.store import Chunk, ChunkRef, ChunkStore, StoreUnavailable
from stillhouse.teacher.actor import publish_when_possible, stored

RECIPE = small_recipe()
BRIEF = Patience(first_pause_s=0.01, last_pause_s=0.01)
BRIEF_END = Patience(tell_after_s=0.0, end_after_s=0.1, first_pause_s=0.01, last_pause_s=0.01)


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


def test_a_full_store_is_waited_for(store: RefusingStore) -> None:
    store.refusals = iter([StoreUnavailable("the disk is full")])
    ref = publish_when_possible(
        store, make_chunk(RECIPE, 1), patience=BRIEF, tell=must_not_be_called
    )
    assert (ref.number, ref.duplicate) == (1, False)
    assert store.published() == {1}


def test_a_store_that_stays_away_is_told_once_and_given_up_with_what_it_said(
    store: RefusingStore,
) -> None:
    store.refusals = repeat(StoreUnavailable("the disk is full"))
    told: list[tuple[float, str]] = []
    with pytest.raises(
        StoreUnavailable, match="the disk is full; after 0 s of waiting it is given up"
    ):
        publish_when_possible(
            store, make_chunk(RECIPE, 1), patience=BRIEF_END, tell=lambda *words: told.append(words)
        )
    assert told == [(0.0, "the disk is full")]
    assert store.published() == set()


def test_a_store_that_forbids_is_not_waited_for(store: RefusingStore) -> None:
    store.refusals = iter([StoreError("permission denied")])
    with pytest.raises(StoreError, match="permission denied"):
        publish_when_possible(store, make_chunk(RECIPE, 1), patience=BRIEF, tell=must_not_be_called)


def test_a_chunk_that_was_cut_short_does_not_count_as_made_already(store: RefusingStore) -> None:
    store.publish(make_chunk(RECIPE, 1))
    assert is_there(store, 1)
    path = Path(store.url) / store.key(1)
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_there(store, 1)


SPEC = TargetSpec(300, 7)


def parts_of(*num_tokens: int) -> list[CompressedLogits]:
    """As so many forward passes give them."""
    logits = torch.randn(sum(num_tokens), 300, generator=torch.Generator().manual_seed(0))
    return [compress(rows, TargetSpec(rows.shape[1], 7)) for rows in logits.split(num_tokens)]


def test_records_are_those_of_all_parts_in_order() -> None:
    parts = parts_of(40, 0, 3, 100)
    records, measured = stored(encoded(iter(parts), SPEC), SPEC)
    whole = concatenate(parts)
    assert torch.equal(records, encode(whole, SPEC))
    assert 0 < measured.codec_kl < measured.worst_kl < 1e-4


def test_what_the_records_lose_is_measured_on_tokens_of_every_part() -> None:
    parts = parts_of(1, 2, 64)
    _, measured = stored(encoded(parts, SPEC), SPEC)
    whole = concatenate(parts)
    assert measured == fidelity(whole, decode(encode(whole, SPEC), SPEC))


def test_targets_that_cannot_be_written_have_no_records() -> None:
    parts = parts_of(5, 5)
    parts[1].logprobs_TK[3] = torch.nan
    with pytest.raises(ChunkError, match="row 3 would hold log-probabilities of no distribution"):
        stored(encoded(parts, SPEC), SPEC)
