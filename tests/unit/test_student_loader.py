"""The loader yields the right rows with their targets to every rank, from any step on, and waits
for what is late, bad or silent.

Shapes: B sequences, L positions, T target tokens. All on a real store in a directory; a store that
is watched is one that tells.
"""

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from helpers.batches import next_batch
from helpers.calls import must_not_be_called
from helpers.chunks import make_chunk, small_recipe
from stillhouse.errors import StoreError, StudentError
from stillhouse.logits import decode
from stillhouse.retry import Patience
from stillhouse.sequence import WorkItem
from stillhouse.store import Chunk, ChunkMissing, ChunkStore, Recipe, StoreUnavailable, pack_chunk
from stillhouse.student.fetching import refuse_bad_chunk
from stillhouse.student.loader import (
    Batch,
    BatchReader,
    MicroBatch,
    chunks_read_ahead,
    steps_in_a_stretch,
)
from stillhouse.student.order import Order

RECIPE = small_recipe(num_sequences=22)  # six chunks of four; the last has two
CHUNKS = [make_chunk(RECIPE, number) for number in range(RECIPE.num_chunks)]
ORDER = Order(
    num_sequences=22, chunk_sequences=4, global_batch_sequences=5, seed=3, window_chunks=2
)
NUM_STEPS = 2 * ORDER.steps_per_epoch
PATIENCE_S = 30


class WatchedStore(ChunkStore):
    """Tells how often a fetch was tried and how it ended; `before` may refuse one."""

    def __init__(self, url: str, recipe: Recipe) -> None:
        super().__init__(url, recipe)
        self.tried: list[int] = []
        self.failed: list[tuple[int, str]] = []
        self.before: Callable[[int], None] = lambda _number: None
        self._changed = threading.Condition()

    def fetch_rows(self, number: int, rows: Sequence[int] | NDArray[np.signedinteger]) -> Chunk:
        with self._changed:
            self.tried.append(number)
            self._changed.notify_all()
        try:
            self.before(number)
            return super().fetch_rows(number, rows)
        except Exception as error:
            with self._changed:
                self.failed.append((number, type(error).__name__))
                self._changed.notify_all()
            raise

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=PATIENCE_S)


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    """A store with every chunk."""
    made = WatchedStore(str(tmp_path / "store"), RECIPE)
    for chunk in CHUNKS:
        made.publish(chunk)
    return made


def path_of(store: ChunkStore, number: int) -> Path:
    return Path(store.url) / store.key(number)


def flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def reader_of(
    store: ChunkStore,
    *,
    order: Order = ORDER,
    start: int = 0,
    stop: int = NUM_STEPS,
    prefetch: int = 2,
    **changes: Any,
) -> BatchReader:
    settled: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "micro_batch": 2,
        "on_bad_chunk": refuse_bad_chunk,
        "on_outage": must_not_be_called,
    } | changes
    return BatchReader(store, order, start=start, stop=stop, prefetch=prefetch, **settled)


def read(
    store: ChunkStore, *, start: int = 0, stop: int = NUM_STEPS, **changes: Any
) -> list[Batch]:
    with reader_of(store, start=start, stop=stop, **changes) as reader:
        return [next_batch(reader) for _ in range(start, stop)]


def assert_micro_batch(found: MicroBatch, sequences: Sequence[int], micro_batch: int) -> None:
    """Each of the sequences, in order, one a row; rows beyond them have no target."""
    assert found.tokens.token_ids_BL.shape == found.tokens.positions_BL.shape == (micro_batch, 12)
    assert (
        found.tokens.token_ids_BL.dtype
        == found.tokens.positions_BL.dtype
        == found.tokens.labels_T.dtype
        == torch.int64
    )
    positions, labels, records = [], [], [np.empty((0, RECIPE.spec.bytes_per_token), np.uint8)]
    for row, sequence in enumerate(sequences):
        chunk = CHUNKS[sequence // 4].row(sequence % 4)
        assert found.tokens.token_ids_BL[row].tolist() == chunk.sequences.token_ids_SL[0].tolist()
        assert found.tokens.positions_BL[row].tolist() == chunk.sequences.positions_SL[0].tolist()
        wanted = np.flatnonzero(chunk.sequences.loss_mask_SL[0])
        positions += (row * 12 + wanted).tolist()
        labels += chunk.sequences.token_ids_SL[0][wanted + 1].tolist()
        records.append(chunk.targets_NB)
    assert found.tokens.target_positions_T.tolist() == positions
    assert found.tokens.labels_T.tolist() == labels
    assert found.tokens.num_targets == len(labels)
    target = decode(torch.from_numpy(np.concatenate(records)), RECIPE.spec)
    for field in ("token_ids_TK", "logprobs_TK", "tail_logmass_T", "tail_ids_TN"):
        assert torch.equal(getattr(found.target, field), getattr(target, field))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_every_rank_gets_its_rows_with_labels_and_targets(
    store: WatchedStore, world_size: int, micro_batch: int
) -> None:
    by_rank = [
        read(store, rank=rank, world_size=world_size, micro_batch=micro_batch)
        for rank in range(world_size)
    ]
    num_micro_batches = -(-5 // (world_size * micro_batch))
    for step in range(NUM_STEPS):
        sequences = ORDER.sequences(step).tolist()
        for rank, batches in enumerate(by_rank):
            batch, mine = batches[step], sequences[rank::world_size]
            assert batch.step == step
            assert batch.sequences == tuple(sequences)
            assert len(batch.micro_batches) == num_micro_batches
            for index, found in enumerate(batch.micro_batches):
                assert_micro_batch(
                    found, mine[index * micro_batch : (index + 1) * micro_batch], micro_batch
                )


def assert_same(found: Batch, wanted: Batch) -> None:
    assert (found.step, found.sequences) == (wanted.step, wanted.sequences)
    for ours, theirs in zip(found.micro_batches, wanted.micro_batches, strict=True):
        for field in ("token_ids_BL", "positions_BL", "target_positions_T", "labels_T"):
            assert torch.equal(getattr(ours.tokens, field), getattr(theirs.tokens, field))
        assert torch.equal(ours.target.token_ids_TK, theirs.target.token_ids_TK)
        assert torch.equal(ours.target.logprobs_TK, theirs.target.logprobs_TK)


@pytest.mark.parametrize("window_chunks", [1, 6])
def test_a_start_at_any_step_yields_what_a_whole_reading_yields_there(
    store: WatchedStore, window_chunks: int
) -> None:
    order = Order(
        num_sequences=22,
        chunk_sequences=4,
        global_batch_sequences=5,
        seed=3,
        window_chunks=window_chunks,
    )
    whole = read(store, order=order, rank=1, world_size=2)
    for start in range(NUM_STEPS):
        for found, wanted in zip(
            read(store, order=order, rank=1, world_size=2, start=start), whole[start:], strict=True
        ):
            assert_same(found, wanted)


def first_step_with(number: int, order: Order = ORDER) -> int:
    return next(
        step
        for step in itertools.count()
        if number in order.sequences(step) // order.chunk_sequences
    )


LATE = int(ORDER.sequences(3)[0] // 4)  # a chunk that the first steps can do without


def test_a_chunk_that_is_published_late_is_waited_for(store: WatchedStore) -> None:
    assert first_step_with(LATE) > 0
    wanted = read(store)
    path_of(store, LATE).unlink()
    with reader_of(store) as reader, ThreadPoolExecutor() as threads:
        found = [next_batch(reader) for _ in range(first_step_with(LATE))]
        waiting = threads.submit(next_batch, reader)
        store.wait_for(lambda: store.failed.count((LATE, "ChunkMissing")) >= 2)
        assert not waiting.done()
        store.publish(CHUNKS[LATE])
        batch = waiting.result(timeout=PATIENCE_S)
        found += [batch] + [next_batch(reader) for _ in range(len(found) + 1, NUM_STEPS)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours, theirs)


def test_a_chunk_that_stays_away_is_missed_aloud(store: WatchedStore) -> None:
    """It may have been deleted, and the teachers believe that it is there."""
    wanted = read(store)
    path_of(store, LATE).unlink()

    def make_again(number: int) -> None:
        assert number == LATE
        store.publish(CHUNKS[LATE])

    for ours, theirs in zip(
        read(store, on_bad_chunk=make_again, missed_s=0.01), wanted, strict=True
    ):
        assert_same(ours, theirs)


@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 3]])
def test_a_row_that_was_set_aside_is_read_and_teaches_nothing(
    store: WatchedStore, rows: list[int]
) -> None:
    wanted = read(store)
    path_of(store, LATE).unlink()
    blank = WorkItem(LATE, CHUNKS[LATE].sequences).without(rows)
    starts = CHUNKS[LATE].row_starts
    kept = [
        CHUNKS[LATE].targets_NB[starts[row] : starts[row + 1]]
        for row in range(4)
        if row not in rows
    ]
    records = np.concatenate([*kept, CHUNKS[LATE].targets_NB[:0]])
    store.publish(Chunk(LATE, blank.sequences, records))
    store.verify(LATE)
    found = read(store)
    set_aside = {LATE * 4 + row for row in rows}
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.sequences == theirs.sequences
        lost = sum(
            int(CHUNKS[LATE].sequences.loss_mask_SL[sequence % 4].sum())
            for sequence in set_aside & set(ours.sequences)
        )
        num_tokens = [
            sum(batch.tokens.num_targets for batch in each.micro_batches) for each in (ours, theirs)
        ]
        assert num_tokens[0] == num_tokens[1] - lost
        if not lost:
            assert_same(ours, theirs)
    assert any(set_aside & set(batch.sequences) for batch in found)


def test_a_damaged_chunk_is_reported_once_and_read_once_it_is_replaced(store: WatchedStore) -> None:
    wanted = read(store)
    path = path_of(store, LATE)
    path.write_bytes(flip_last_bit(path.read_bytes()))
    reported: list[int] = []
    fresh = WatchedStore(store.url, RECIPE)  # knows nothing of the chunk as it was
    with reader_of(fresh, on_bad_chunk=reported.append) as reader:
        found = [next_batch(reader) for _ in range(first_step_with(LATE))]
        fresh.wait_for(lambda: fresh.failed.count((LATE, "ChunkError")) >= 3)
        assert reported == [LATE]
        assert store.quarantine(LATE)
        store.publish(CHUNKS[LATE])
        found += [next_batch(reader) for _ in range(len(found), NUM_STEPS)]
    assert reported == [LATE]
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours, theirs)


@pytest.mark.timeout(60, method="thread")
def test_a_pipe_in_a_chunks_place_is_reported_as_damage_and_read_once_it_is_replaced(
    store: WatchedStore,
) -> None:
    wanted = read(store)
    path_of(store, LATE).unlink()
    os.mkfifo(path_of(store, LATE))

    def replace_it(number: int) -> None:
        assert number == LATE
        assert store.quarantine(number)
        store.publish(CHUNKS[number])

    for ours, theirs in zip(
        read(ChunkStore(store.url, RECIPE), on_bad_chunk=replace_it), wanted, strict=True
    ):
        assert_same(ours, theirs)


def test_each_read_is_told_as_it_begins_and_as_it_ends_and_waiting_for_a_chunk_is_none(
    store: WatchedStore,
) -> None:
    path_of(store, LATE).unlink()
    reads: list[int | None] = []
    store.before = lambda number: reads.append(-1 - number)
    with reader_of(store, on_read=reads.append) as reader:
        for _ in range(first_step_with(LATE)):
            next_batch(reader)
        store.wait_for(lambda: store.failed.count((LATE, "ChunkMissing")) >= 3)
        store.publish(CHUNKS[LATE])
        for _ in range(first_step_with(LATE), NUM_STEPS):
            next_batch(reader)
    assert reads.count(LATE) >= 4
    for begun, inside, ended in zip(reads[::3], reads[1::3], reads[2::3], strict=True):
        assert begun is not None
        assert (inside, ended) == (-1 - begun, None)


def test_a_damaged_chunk_whose_report_is_lost_is_reported_again(store: WatchedStore) -> None:
    path, reported = path_of(store, LATE), []
    path.write_bytes(flip_last_bit(path.read_bytes()))

    def hear_the_third(number: int) -> None:
        reported.append(number)
        if len(reported) == 3:
            assert store.quarantine(number)
            store.publish(CHUNKS[number])

    read(ChunkStore(store.url, RECIPE), on_bad_chunk=hear_the_third, missed_s=0.01)
    assert reported == [LATE] * 3


def test_a_chunk_that_is_replaced_by_another_damaged_one_is_reported_again(
    store: WatchedStore,
) -> None:
    path, reported = path_of(store, LATE), []
    path.write_bytes(flip_last_bit(path.read_bytes()))
    told = threading.Semaphore(0)

    def report(number: int) -> None:
        reported.append(number)
        told.release()

    fresh = WatchedStore(store.url, RECIPE)
    with reader_of(fresh, on_bad_chunk=report) as reader:
        for _ in range(first_step_with(LATE)):
            next_batch(reader)
        assert told.acquire(timeout=PATIENCE_S)
        assert store.quarantine(LATE)
        fresh.wait_for(lambda: (LATE, "ChunkMissing") in fresh.failed)
        draft = path.with_name("draft")
        draft.write_bytes(flip_last_bit(pack_chunk(CHUNKS[LATE], RECIPE)))
        draft.rename(path)
        assert told.acquire(timeout=PATIENCE_S)
        assert store.quarantine(LATE)
        store.publish(CHUNKS[LATE])
        for _ in range(first_step_with(LATE), NUM_STEPS):
            next_batch(reader)
    assert reported == [LATE, LATE]


def test_a_chunk_that_was_published_with_impossible_records_is_reported_and_replaced_too(
    store: WatchedStore,
) -> None:
    """Its hashes are right: only decoding tells."""
    wanted = read(store)
    sound = CHUNKS[LATE]
    nonsense = Chunk(LATE, sound.sequences, np.full_like(sound.targets_NB, 0xFF))
    path_of(store, LATE).unlink()
    store.publish(nonsense)
    reported: list[int] = []

    def replace(number: int) -> None:
        reported.append(number)
        assert store.quarantine(number)
        store.publish(CHUNKS[number])

    for ours, theirs in zip(
        read(WatchedStore(store.url, RECIPE), on_bad_chunk=replace), wanted, strict=True
    ):
        assert_same(ours, theirs)
    assert reported == [LATE]


def test_without_a_pool_a_damaged_chunk_ends_the_reading_by_name(store: WatchedStore) -> None:
    path = path_of(store, LATE)
    path.write_bytes(flip_last_bit(path.read_bytes()))
    with reader_of(ChunkStore(store.url, RECIPE), on_bad_chunk=refuse_bad_chunk) as reader:
        for _ in range(first_step_with(LATE)):
            next_batch(reader)
        with pytest.raises(
            StudentError, match=rf"chunk {LATE} in the store is damaged.*store verify URL --repair"
        ):
            next_batch(reader)


def test_a_store_that_does_not_answer_is_asked_again(store: WatchedStore) -> None:
    wanted = read(store)
    answers = iter([StoreUnavailable("busy"), ChunkMissing("not yet"), StoreUnavailable("busy")])

    def moody(_number: int) -> None:
        error = next(answers, None)
        if error is not None:
            raise error

    store.before = moody
    for ours, theirs in zip(read(store), wanted, strict=True):
        assert_same(ours, theirs)
    assert next(answers, None) is None


def test_a_store_that_stays_away_is_told_once_and_given_up(store: WatchedStore) -> None:
    def refuse(_number: int) -> None:
        raise StoreUnavailable("busy")

    store.before = refuse
    told: list[tuple[float, str]] = []
    patience = Patience(tell_after_s=0.0, end_after_s=0.2)
    with (
        reader_of(store, patience=patience, on_outage=lambda *words: told.append(words)) as reader,
        pytest.raises(
            StoreUnavailable,
            match=r"busy; after 0 s of waiting it is given up.*run again to go on from there",
        ),
    ):
        next_batch(reader)
    assert told == [(0.0, "busy")]


def test_outages_with_an_answer_between_are_not_added_up(store: WatchedStore) -> None:
    """Each chunk is refused once, so no outage lasts; together they would outlast this patience by
    far."""
    wanted = read(store)
    refused: set[int] = set()

    def away_at_first(number: int) -> None:
        if number not in refused:
            refused.add(number)
            raise StoreUnavailable("busy")

    store.before = away_at_first
    for ours, theirs in zip(read(store, patience=Patience(end_after_s=0.02)), wanted, strict=True):
        assert_same(ours, theirs)
    assert refused == set(range(RECIPE.num_chunks))


def test_any_other_error_of_the_store_is_raised_as_itself(store: WatchedStore) -> None:
    def refuse(_number: int) -> None:
        raise StoreError("permission denied")

    store.before = refuse
    with reader_of(store) as reader, pytest.raises(StoreError, match="permission denied"):
        next_batch(reader)


def test_closing_does_not_wait_for_a_chunk_that_is_not_there(store: WatchedStore) -> None:
    for number in range(RECIPE.num_chunks):
        path_of(store, number).unlink()
    with reader_of(store):
        store.wait_for(lambda: len(store.failed) >= 6)  # now it means to wait for a second
        began = monotonic()
    assert monotonic() - began < 0.9
    num_tried = len(store.tried)
    assert read_threads() == 0
    assert len(store.tried) == num_tried


def test_closing_does_not_wait_for_a_consumer(store: WatchedStore) -> None:
    with reader_of(store, prefetch=1) as reader:
        next_batch(reader)
    assert read_threads() == 0


def read_threads() -> int:
    return sum(thread.name == "batch-reader" for thread in threading.enumerate())


def test_no_more_is_read_ahead_than_was_asked_for(store: WatchedStore) -> None:
    """Here a step is a chunk. Beside the batches that wait there is one in hand, so the consumer's
    step is never more than 4 behind."""
    order = Order(
        num_sequences=20, chunk_sequences=4, global_batch_sequences=4, seed=3, window_chunks=1
    )
    taken = 0
    leads: list[int] = []
    store.before = lambda _number: leads.append(len(store.tried) - taken)
    with reader_of(store, order=order, stop=15, prefetch=3) as reader:
        store.wait_for(lambda: len(store.tried) == 4)
        read(ChunkStore(store.url, RECIPE))  # time enough for a reader that would read on
        assert len(store.tried) == 4
        for _ in range(15):
            next_batch(reader)
            taken += 1
    assert max(leads) <= 5  # one more where the reader was faster than this count


@st.composite
def orders(draw: st.DrawFn) -> Order:
    number = st.integers(1, 9)
    return Order(
        draw(st.integers(1, 60)),
        draw(number),
        draw(st.integers(1, 30)),
        seed=draw(number),
        window_chunks=draw(st.integers(1, 4)),
    )


@given(order=orders(), epochs=st.sampled_from([0.5, 1, 2]))
@example(
    order=Order(7, 3, 1, seed=2, window_chunks=1), epochs=1
)  # a stretch that runs through the short chunk
@example(order=Order(60, 2, 30, seed=0, window_chunks=1), epochs=1)  # a step of many windows
@settings(max_examples=150, deadline=None)
def test_a_window_of_chunks_read_ahead_lets_every_reader_go_on(order: Order, epochs: float) -> None:
    """Wherever a reader starts, the chunks that it needs before it can yield are within the window
    of the cursor that it last moved."""
    stop = max(1, int(epochs * order.steps_per_epoch))
    position = {chunk: index for index, chunk in enumerate(order.chunks_in_reading_order(stop))}
    for first in range(stop):
        steps = range(first, min(stop, first + steps_in_a_stretch(order)))
        needed = max(
            position[chunk]
            for step in steps
            for chunk in (order.sequences(step) // order.chunk_sequences).tolist()
        )
        assert needed < order.chunks_finished(first) + chunks_read_ahead(order)
