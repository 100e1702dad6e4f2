"""The order of training: each sequence once an epoch, the same for every world size, and never a
different one by accident."""

from itertools import chain, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.student.order import Order, rank_rows

quick = settings(max_examples=80, deadline=None)
orders = st.builds(
    Order,
    num_sequences=st.integers(1, 150),
    chunk_sequences=st.integers(1, 20),
    global_batch_sequences=st.integers(1, 40),
    seed=st.integers(-(2**63), 2**63 - 1),
    window_chunks=st.integers(1, 6),
)


def steps_of(order: Order, epoch: int) -> list[list[int]]:
    first = epoch * order.steps_per_epoch
    return [order.sequences(step).tolist() for step in range(first, first + order.steps_per_epoch)]


@quick
@given(order=orders, epoch=st.integers(0, 3))
def test_an_epoch_reads_each_sequence_exactly_once_in_full_steps_but_the_last(
    order: Order, epoch: int
) -> None:
    steps = steps_of(order, epoch)
    assert sorted(chain.from_iterable(steps)) == list(range(order.num_sequences))
    assert all(len(step) == order.global_batch_sequences for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= order.global_batch_sequences


@quick
@given(
    order=orders,
    step=st.integers(0, 50),
    world_size=st.integers(1, 9),
    micro_batch=st.integers(1, 7),
)
def test_any_world_size_reads_the_same_global_batches(
    order: Order, step: int, world_size: int, micro_batch: int
) -> None:
    batch = order.sequences(step)
    shares = [
        rank_rows(batch, rank=rank, world_size=world_size, micro_batch=micro_batch)
        for rank in range(world_size)
    ]
    assert len({share.shape for share in shares}) == 1
    assert shares[0].shape[1] == micro_batch
    assert (len(shares[0]) - 1) * world_size * micro_batch < len(batch)
    rows = np.concatenate([share.ravel() for share in shares])
    assert sorted(rows[rows >= 0]) == sorted(batch)
    assert set(rows[rows < 0]) <= {-1}
    loads = [int((share >= 0).sum()) for share in shares]
    assert max(loads) - min(loads) <= 1


@quick
@given(order=orders)
def test_sequences_are_mixed_only_within_a_few_neighbouring_chunks(order: Order) -> None:
    read = np.array(list(chain.from_iterable(steps_of(order, 0)))) // order.chunk_sequences
    first = {chunk: int(np.flatnonzero(read == chunk)[0]) for chunk in set(read.tolist())}
    last = {chunk: int(np.flatnonzero(read == chunk)[-1]) for chunk in first}
    most_open = max(
        sum(first[chunk] <= at <= last[chunk] for chunk in first) for at in range(len(read))
    )
    assert most_open <= order.window_chunks


@quick
@given(order=orders, num_steps=st.integers(0, 40))
def test_the_reading_order_is_that_of_first_use(order: Order, num_steps: int) -> None:
    used = [
        sequence // order.chunk_sequences
        for step in range(num_steps)
        for sequence in order.sequences(step).tolist()
    ]
    assert order.chunks_in_reading_order(num_steps) == list(dict.fromkeys(used))


@quick
@given(order=orders)
def test_a_longer_run_only_adds_to_the_reading_order(order: Order) -> None:
    lists = [
        order.chunks_in_reading_order(num_steps) for num_steps in range(order.steps_per_epoch + 2)
    ]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(lists))
    assert sorted(lists[-1]) == list(range(order.num_chunks))


@quick
@given(order=orders)
def test_a_finished_chunk_is_never_read_again_in_the_first_epoch(order: Order) -> None:
    reading_order = order.chunks_in_reading_order(order.steps_per_epoch)
    steps = steps_of(order, 0)
    for done in range(order.steps_per_epoch + 1):
        finished = reading_order[: order.chunks_finished(done)]
        needed = {sequence // order.chunk_sequences for step in steps[done:] for sequence in step}
        assert not needed.intersection(finished)
        # and at most one group lags behind
        assert len(needed | set(finished)) > order.num_chunks - order.window_chunks
    assert order.chunks_finished(order.steps_per_epoch) == order.num_chunks
    assert order.chunks_finished(7 * order.steps_per_epoch) == order.num_chunks


def test_epochs_and_seeds_differ() -> None:
    order = Order(600, 20, 30, seed=1, window_chunks=4)
    other = Order(600, 20, 30, seed=2, window_chunks=4)
    negative = Order(600, 20, 30, seed=-1, window_chunks=4)
    epochs = [str(steps_of(order, epoch)) for epoch in range(5)] + [
        str(steps_of(other, 0)),
        str(steps_of(negative, 0)),
    ]
    assert len(set(epochs)) == 7


def test_a_shuffled_epoch_is_not_a_sorted_one() -> None:
    order = Order(4096, 16, 64, seed=0, window_chunks=4)
    read = np.concatenate([order.sequences(step) for step in range(order.steps_per_epoch)])
    assert abs(np.corrcoef(read, np.arange(4096))[0, 1]) < 0.1


def test_what_a_caller_does_to_a_batch_does_not_change_the_order() -> None:
    order = Order(10, 10, 10, seed=0, window_chunks=1)
    before = order.sequences(0).copy()
    order.sequences(0)[:] = 0
    assert order.sequences(0).tolist() == before.tolist()


def test_a_step_of_a_hundred_million_sequences_costs_only_its_groups() -> None:
    order = Order(10**8, 4096, 512, seed=3, window_chunks=2)
    assert len(set(order.sequences(order.steps_per_epoch - 1).tolist())) == 10**8 - 512 * (
        order.steps_per_epoch - 1
    )
    assert len(order.sequences(12_345)) == 512
    assert 0 <= order.sequences(12_345).min() <= order.sequences(12_345).max() < 10**8


def test_the_order_is_what_it_always_was() -> None:
    """A store's streaming window and a resumed run rely on this: changed numbers here are a changed
    format."""
    order = Order(
        num_sequences=23, chunk_sequences=4, global_batch_sequences=5, seed=7, window_chunks=2
    )
    assert steps_of(order, 0) == [
        [14, 8, 15, 9, 12],
        [13, 11, 10, 18, 19],
        [7, 16, 4, 17, 6],
        [5, 2, 21, 0, 1],
        [20, 22, 3],
    ]
    assert steps_of(order, 1) == [
        [16, 8, 11, 19, 18],
        [9, 17, 10, 14, 15],
        [12, 3, 2, 0, 1],
        [13, 6, 4, 22, 5],
        [7, 20, 21],
    ]
    assert order.chunks_in_reading_order(5) == [3, 2, 4, 1, 0, 5]
    assert [order.chunks_finished(step) for step in range(6)] == [0, 0, 2, 2, 4, 6]


def test_ranks_share_a_short_step_evenly() -> None:
    batch = np.arange(10, 17)
    assert rank_rows(batch, rank=0, world_size=3, micro_batch=2).tolist() == [[10, 13], [16, -1]]
    assert rank_rows(batch, rank=2, world_size=3, micro_batch=2).tolist() == [[12, 15], [-1, -1]]
