"""The pool at its largest: two thousand teachers and a million chunks, on one core and in bounded
memory."""

import tracemalloc
from time import process_time

import numpy as np
import pytest

from helpers.chunks import small_recipe
from helpers.simulation import Mailbox, SimulatedCrew
from stillhouse.config import TeacherSection
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import ChunkRef, ChunkStore
from stillhouse.teacher.actor import Ready
from stillhouse.teacher.pool import comparison, limits_of
from stillhouse.tracking import RunEvent

NUM_TEACHERS = 2000
# 8 for its place in the order, 1 for whether it is settled, 1 for whether the simulation published
# it
BYTES_PER_CHUNK = 10
ITEM = WorkItem(
    0, Sequences(*(np.zeros((1, 2), dtype) for dtype in (np.int32, np.int32, np.uint8)))
)


class Enough(Exception):
    pass


def pool_and_crew(
    num_chunks: int, num_teachers: int
) -> tuple[Dispatcher[WorkItem, Ready], SimulatedCrew]:
    """Teachers that take about two seconds for a chunk, some of them far longer, and whose chunks
    weigh nothing."""
    published = bytearray(num_chunks)
    random = np.random.default_rng(0)

    def item_of(number: int) -> WorkItem:
        return WorkItem(number, ITEM.sequences)

    def publish(item: WorkItem) -> ChunkRef:
        duplicate, published[item.number] = bool(published[item.number]), 1
        return ChunkRef("", item.number, 1, 1, "", duplicate)

    crew = SimulatedCrew(
        publish=publish,
        is_there=lambda number: bool(published[number]),
        seconds=lambda _teacher, _item: float(random.exponential(2.0)),
    )
    crew.begun = crew.computed = _Forgetful()
    recipe = small_recipe(num_sequences=num_chunks, chunk_sequences=1)
    pool = Dispatcher(
        crew,
        limits_of(
            TeacherSection(model="simulated", min_replicas=num_teachers, max_replicas=num_teachers)
        ),
        compare=comparison(recipe),
        store=ChunkStore(f"memory://load-{num_chunks}", recipe),
        order=np.random.default_rng(1).permutation(num_chunks),
        item_of=item_of,
        window_chunks=num_chunks,
        journal=_Deaf(),
        clock=crew.clock,
        wall=crew.clock,
    )
    return pool, crew


class _Forgetful(list[int]):
    """What the simulation remembers is not what is measured."""

    def append(self, _number: int) -> None:
        pass


class _Deaf:
    def record(self, row: RunEvent) -> None:
        pass


def test_it_hands_out_a_thousand_leases_a_second_to_two_thousand_teachers_on_one_core() -> None:
    pool, crew = pool_and_crew(20_000, NUM_TEACHERS)
    began = process_time()
    pool.run(readers=(), coordinator=Mailbox(), finished=lambda: True)
    rate = crew.num_submitted / (process_time() - began)
    assert crew.num_submitted >= 20_000
    assert rate >= 1000  # measured: 24,000


def bytes_after(num_chunks: int, num_leases: int) -> int:
    """What pool and simulation hold in the middle of the work, beyond the fixed bytes of each
    chunk."""

    def finished() -> bool:
        if crew.num_submitted >= num_leases:
            raise Enough
        return True

    tracemalloc.start()
    try:
        pool, crew = pool_and_crew(num_chunks, 200)
        with pytest.raises(Enough):
            pool.run(readers=(), coordinator=Mailbox(), finished=finished)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return held - num_chunks * BYTES_PER_CHUNK


def test_its_memory_grows_neither_with_the_corpus_nor_with_the_work_done() -> None:
    small, large, later = (
        bytes_after(100_000, 2_000),
        bytes_after(1_000_000, 2_000),
        bytes_after(100_000, 10_000),
    )
    # two hundred teachers with two leases each, and their simulation
    assert 100_000 < small < 1_000_000
    assert abs(large - small) < 50_000
    assert later - small < 200_000
