"""The pool on simulated teachers and a simulated clock: whichever machines join, leave or fail,
every chunk is made."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.chunks import small_recipe
from helpers.simulation import Death, Mailbox, SimulatedCrew, item_of, publish
from stillhouse.cluster.preemption import PreemptionNotice
from stillhouse.config import TeacherSection
from stillhouse.errors import ChangedWeightsError, StoreError, TeacherError
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.sequence import WorkItem
from stillhouse.store import Chunk, ChunkStore, StoreUnavailable
from stillhouse.teacher.actor import Ready
from stillhouse.teacher.pool import comparison, limits_of
from stillhouse.tracking import (
    ChunkEvent,
    PoolEvent,
    RepairEvent,
    RunEvent,
    SetAsideEvent,
    StallEvent,
    TeacherEvent,
)

_Event = TypeVar("_Event", bound=RunEvent)
_names = itertools.count()

NUM_CHUNKS = 20


@dataclass
class World:
    """A store in memory, teachers that may be told how to behave, and a pool to run."""

    num_chunks: int = NUM_CHUNKS
    window: int = 1000
    teacher: dict[str, Any] = field(default_factory=dict)
    rows: list[RunEvent] = field(default_factory=list)
    mailbox: Mailbox = field(default_factory=Mailbox)
    url: str = field(default_factory=lambda: f"memory://pool-{next(_names)}")

    def __post_init__(self) -> None:
        recipe = small_recipe(num_sequences=4 * self.num_chunks, sequence_length=6)
        self.store = ChunkStore.create(self.url, recipe)
        self.crew = SimulatedCrew(
            publish=lambda item: publish(self.store, item), is_there=self.store.is_whole
        )

    def record(self, row: RunEvent) -> None:
        self.rows.append(row)

    def pool(self) -> Dispatcher[WorkItem, Ready]:
        settings: dict[str, Any] = {
            "min_replicas": 1,
            "max_replicas": 4,
            "max_failures": 2,
            "lease_timeout_s": 300.0,
        } | self.teacher
        return Dispatcher(
            self.crew,
            limits_of(TeacherSection(model="simulated", **settings)),
            compare=comparison(self.store.recipe),
            store=self.store,
            order=list(range(self.num_chunks)),
            item_of=lambda number: item_of(self.store.recipe, number),
            window_chunks=self.window,
            journal=self,
            clock=self.crew.clock,
            wall=self.crew.clock,
        )

    def run(
        self,
        *,
        readers: tuple[str, ...] = (),
        finished: Callable[[], bool] = lambda: True,
        limit_s: float = 1e6,
    ) -> None:
        end = self.crew.now + limit_s

        def finished_in_time() -> bool:
            assert self.crew.now < end, f"not done after {limit_s} simulated seconds"
            return finished()

        self.pool().run(readers=readers, coordinator=self.mailbox, finished=finished_in_time)

    def of(self, kind: type[_Event]) -> list[_Event]:
        return [row for row in self.rows if isinstance(row, kind)]

    @property
    def last(self) -> PoolEvent:
        return self.of(PoolEvent)[-1]

    def die_at_start(self, which: Callable[[int], bool]) -> None:
        def starts(teacher: int) -> bool:
            if which(teacher):
                self.crew.die(teacher, "out of memory")
            return not which(teacher)

        self.crew.starts = starts

    def notice(self, node: str, *, seconds: float) -> None:
        self.mailbox.notices[node] = PreemptionNotice(
            "aws", self.crew.now + seconds, "spot instance-action terminate"
        )

    def assert_all_is_there(self) -> None:
        assert self.store.published() == set(range(self.num_chunks))
        for number in range(self.num_chunks):
            self.store.verify(number)


def test_every_chunk_is_made_once_by_teachers_that_are_well() -> None:
    world = World()
    world.run()
    world.assert_all_is_there()
    assert Counter(world.crew.computed) == Counter(range(NUM_CHUNKS))
    assert world.crew.now == 1000 + 5 + NUM_CHUNKS / 4 * 10  # four teachers at work without a pause


@pytest.mark.parametrize("stale", [0, 4])
def test_a_teacher_of_other_weights_than_planned_ends_the_run_and_publishes_nothing(
    stale: int,
) -> None:
    """The first one, which has no fellow to be compared with, and one that comes in place of
    another when chunks are there already."""
    world = World(teacher={"max_replicas": 1})
    planned = world.store.recipe.teacher_digest
    world.crew.weights = lambda teacher: "0" * 64 if teacher == stale else planned
    for death in range(stale):
        world.crew.at(1050.0 + 25 * death, partial(world.crew.die, death))
    with pytest.raises(
        ChangedWeightsError,
        match=rf"replica {stale} .*found 0000000000000000, wanted {planned[:16]};.*same command "
        r"again",
    ):
        world.run()
    assert world.crew.num_spawned == stale + 1
    assert bool(world.store.published()) == (stale > 0)
    assert [row.replica for row in world.of(TeacherEvent)] == [*range(stale)]


def test_a_straggler_at_the_end_is_hedged_and_costs_one_duplicate() -> None:
    world = World()
    world.crew.seconds = lambda teacher, item: (
        250.0 if item.number == NUM_CHUNKS - 1 and teacher == 3 else 10.0
    )
    world.run()
    world.assert_all_is_there()
    assert world.last.hedged >= 1
    assert world.crew.now < 1000 + 5 + NUM_CHUNKS / 4 * 10 + 60
    assert Counter(world.crew.begun) == Counter([*range(NUM_CHUNKS), NUM_CHUNKS - 1])


def test_a_chunk_on_a_teacher_that_hangs_is_made_by_another_and_the_teacher_is_replaced() -> None:
    world = World(num_chunks=60, teacher={"max_replicas": 2})
    world.crew.seconds = lambda teacher, item: 1e9 if teacher == 0 and item.number >= 4 else 60.0
    world.run()
    world.assert_all_is_there()
    assert world.last.late >= 1
    assert [row.replica for row in world.of(TeacherEvent)] == [0, 1, 2]
    assert world.last.failures == 0


def test_one_stopped_teacher_of_one_costs_minutes_and_is_named() -> None:
    world = World(num_chunks=6, teacher={"max_replicas": 1, "lease_timeout_s": 3600.0})
    world.crew.seconds = lambda teacher, item: 1e9 if teacher == 0 and item.number == 2 else 60.0
    world.mailbox.beating = lambda: world.crew.placed() - ({0} if world.crew.now > 1200 else set())
    world.run(limit_s=1800)
    world.assert_all_is_there()
    assert [row.replica for row in world.of(TeacherEvent)] == [0, 1]
    (stall,) = world.of(StallEvent)
    assert (stall.role, stall.rank, stall.phase, stall.chunk) == ("teacher", 0, "work", 2)
    assert stall.seconds == pytest.approx(300, abs=1)
    assert world.last.losses == 1


def test_a_teacher_that_is_stopped_while_it_starts_is_replaced() -> None:
    world = World(num_chunks=2, teacher={"max_replicas": 1})
    world.crew.starts = lambda teacher: teacher > 0
    world.mailbox.beating = lambda: world.crew.placed() - ({0} if world.crew.now > 1002 else set())
    world.run(limit_s=1800)
    world.assert_all_is_there()
    assert [(stall.rank, stall.phase, stall.chunk) for stall in world.of(StallEvent)] == [
        (0, "start", None)
    ]


def test_a_teacher_that_works_on_a_chunk_for_hours_and_gives_signs_of_life_is_let_be() -> None:
    world = World(num_chunks=2, teacher={"max_replicas": 1, "lease_timeout_s": 20_000.0})
    world.crew.seconds = lambda _teacher, _item: 15_000.0
    world.mailbox.beating = world.crew.placed
    world.run()
    world.assert_all_is_there()
    assert not world.of(StallEvent)
    assert Counter(world.crew.computed) == Counter(range(2))


def test_a_teacher_that_waits_for_a_place_for_hours_is_not_silent() -> None:
    world = World(num_chunks=2, teacher={"max_replicas": 1})
    world.crew.nodes = {}
    world.crew.at(20_000, lambda: world.crew.add_node("a", 1))
    world.mailbox.beating = world.crew.placed
    world.run()
    world.assert_all_is_there()
    assert not world.of(StallEvent)


def test_a_late_answer_is_accepted() -> None:
    """Both teachers are slower than the deadline: what is late arrives all the same, and who was to
    make it again finds it there."""
    world = World(num_chunks=4, teacher={"max_replicas": 2, "lease_timeout_s": 50.0})
    world.crew.seconds = lambda _teacher, _item: 60.0
    world.run()
    world.assert_all_is_there()
    assert world.last.late >= 2
    assert len(world.of(TeacherEvent)) == 2
    assert Counter(world.crew.computed) == Counter(range(4))


def test_a_killed_teacher_costs_at_most_its_leased_chunks() -> None:
    world = World()
    for kill in range(8):
        world.crew.at(1000 + 9 + 17 * kill, partial(world.crew.die, kill))
    world.run()
    world.assert_all_is_there()
    assert 0 < world.last.losses <= 8  # what was in work; what waited beside it had not begun
    assert len(world.crew.begun) - NUM_CHUNKS <= world.last.losses
    assert not world.of(SetAsideEvent)


def test_no_number_of_preemptions_is_final() -> None:
    world = World(num_chunks=6, teacher={"max_replicas": 1, "max_failures": 1})
    world.crew.seconds = lambda _teacher, _item: 50.0

    def preempt_and_come_back(round_: int = 0) -> None:
        world.crew.remove_node("a", preempted=True)
        world.crew.add_node("a", 1)
        if round_ < 40:
            world.crew.at(world.crew.now + 30, lambda: preempt_and_come_back(round_ + 1))

    world.crew.nodes = {"a": 1}
    world.crew.at(1020, preempt_and_come_back)
    world.run()
    world.assert_all_is_there()
    assert world.last.losses >= 40
    assert not world.of(SetAsideEvent)


def test_machines_that_vanish_while_teachers_start_are_no_failure_to_start() -> None:
    world = World(num_chunks=2, teacher={"max_replicas": 1, "max_failures": 1})
    world.crew.nodes = {"node-0": 1}

    def vanish(number: int = 0) -> None:
        world.crew.remove_node(f"node-{number}")
        world.crew.add_node(f"node-{number + 1}", 1)
        if number < 20:
            world.crew.at(world.crew.now + 3, lambda: vanish(number + 1))

    world.crew.at(1003, vanish)
    world.run()
    world.assert_all_is_there()


def test_teachers_that_die_as_they_start_one_after_the_other_end_the_run() -> None:
    world = World(teacher={"max_replicas": 2, "max_failures": 2})
    world.die_at_start(lambda _teacher: True)
    with pytest.raises(
        TeacherError,
        match="4 teachers died one after the other while they started, the last with: out of "
        "memory",
    ):
        world.run()


def test_a_draining_node_gets_no_new_leases_and_hands_back_what_it_has_not_begun() -> None:
    world = World(num_chunks=40, teacher={"max_replicas": 4})
    world.crew.nodes = {"a": 2, "b": 2}
    world.crew.at(1012, lambda: world.notice("a", seconds=30))
    world.crew.at(1012, lambda: world.crew.drained.add("a"))
    world.crew.at(1042, lambda: world.crew.remove_node("a"))
    world.crew.at(1500, lambda: world.crew.add_node("a", 2))
    world.run()
    world.assert_all_is_there()
    # what was in work was finished, and nothing was begun twice
    assert Counter(world.crew.computed) == Counter(range(40))
    assert (world.last.losses, world.last.failures) == (0, 0)
    begun_on_a = [row for row in world.of(ChunkEvent) if row.replica in (0, 1)]
    assert len(begun_on_a) == 2  # the ones in work when the notice came


def test_a_teacher_that_comes_up_on_a_node_that_will_go_gets_nothing() -> None:
    world = World(num_chunks=40)
    world.crew.nodes = {"b": 1, "a": 10}
    world.crew.at(1012, lambda: world.notice("a", seconds=100))
    world.crew.at(1112, lambda: world.crew.remove_node("a"))
    world.run()
    world.assert_all_is_there()
    assert {row.replica for row in world.of(ChunkEvent)} == {0, 1, 2, 3}
    # three places are tried, not more than every half minute
    assert 4 < len(world.of(TeacherEvent)) <= 4 + 3 * 4
    assert (world.last.losses, world.last.failures) == (0, 0)


def test_work_that_outlasts_a_notice_is_made_elsewhere_and_nobody_is_blamed() -> None:
    world = World(num_chunks=8, teacher={"max_failures": 1, "max_replicas": 2})
    world.crew.nodes = {"a": 1, "b": 1}
    world.crew.seconds = lambda _teacher, _item: 100.0
    world.crew.at(1012, lambda: world.notice("a", seconds=30))
    world.crew.at(1012, lambda: world.crew.drained.add("a"))
    world.run()
    world.assert_all_is_there()
    assert (world.last.losses, world.last.failures, world.last.late) == (0, 0, 0)
    assert {row.replica for row in world.of(ChunkEvent)} == {1}


def test_a_machine_that_lives_on_after_its_notice_is_used_again() -> None:
    world = World(num_chunks=10, teacher={"max_replicas": 1})
    world.crew.nodes = {"a": 1}
    world.crew.at(1012, lambda: world.notice("a", seconds=30))
    world.run()
    world.assert_all_is_there()
    assert world.crew.now > 1042 + 300


def test_teachers_without_a_place_hold_nothing_up_and_join_when_machines_come() -> None:
    world = World(num_chunks=60, teacher={"max_replicas": 4})
    world.crew.nodes = {"a": 1}
    world.crew.at(1100, lambda: world.crew.add_node("b", 3))
    world.run()
    world.assert_all_is_there()
    assert world.crew.num_spawned == 4
    assert max(row.replicas for row in world.of(PoolEvent)) == 4
    assert {row.replica for row in world.of(ChunkEvent)} == {0, 1, 2, 3}
    assert Counter(world.crew.computed) == Counter(range(60))


def test_work_begins_with_the_fewest_teachers_and_goes_on_with_fewer() -> None:
    world = World(teacher={"min_replicas": 3, "max_replicas": 4})
    world.crew.nodes = {"a": 2, "b": 2}
    world.crew.at(1030, lambda: world.crew.remove_node("b"))
    world.run()
    world.assert_all_is_there()
    first_chunk = next(index for index, row in enumerate(world.rows) if isinstance(row, ChunkEvent))
    assert len([row for row in world.rows[:first_chunk] if isinstance(row, TeacherEvent)]) >= 3
    assert world.last.replicas == 2


def test_teachers_that_die_as_they_start_are_not_asked_for_without_a_pause() -> None:
    world = World(num_chunks=2, teacher={"max_replicas": 1, "max_failures": 5})
    world.die_at_start(lambda teacher: teacher < 4)
    world.run()
    world.assert_all_is_there()
    assert world.crew.now >= 1000 + 5 * 5 + 1 + 2 + 4 + 8


def touches(item: WorkItem, sequence: int) -> bool:
    return bool((item.sequences.token_ids_SL[:, 0] == sequence + 1).any())


@pytest.mark.parametrize("poison", [ValueError("a poison sequence"), Death("out of memory")])
def test_poison_is_set_aside_by_name_and_its_neighbours_are_trained_on(poison: Exception) -> None:
    world = World()
    world.crew.fate = lambda _teacher, item: poison if touches(item, 41) else None
    world.run()
    world.assert_all_is_there()
    (row,) = world.of(SetAsideEvent)
    assert (row.chunk, row.sequences) == (10, [41])
    assert str(poison) in row.reason
    chunk = world.store.fetch(10)
    assert chunk.sequences.loss_mask_SL.any(axis=1).tolist() == [True, False, True, True]
    assert chunk.sequences.token_ids_SL[1].tolist() == [0] * 6
    whole, alone = (6, 6) if isinstance(poison, Death) else (2, 2)
    assert Counter(world.crew.computed)[10] == whole + 1
    assert world.last.failures + world.last.losses == whole + alone


def test_poison_in_several_chunks_is_named_in_each() -> None:
    world = World()
    world.crew.fate = lambda _teacher, item: (
        ValueError("no") if any(touches(item, bad) for bad in (5, 6, 7, 50)) else None
    )
    world.run()
    world.assert_all_is_there()
    assert sorted((row.chunk, row.sequences) for row in world.of(SetAsideEvent)) == [
        (1, [5, 6, 7]),
        (12, [50]),
    ]


def test_more_poison_than_may_be_set_aside_ends_the_run_by_name() -> None:
    world = World(teacher={"max_set_aside": 2})
    world.crew.fate = lambda _teacher, item: ValueError("no") if item.number == 3 else None
    with pytest.raises(
        TeacherError,
        match=r"chunk 3 failed 2 times, .* \(rows 0, 1, 2\), last with: ValueError: no\. With 0 "
        r"set aside",
    ):
        world.run()


def test_a_chunk_repaired_after_poison_leaves_the_same_sequences_out() -> None:
    world = World(num_chunks=8)
    world.crew.fate = lambda _teacher, item: ValueError("no") if touches(item, 5) else None
    reported: list[Chunk] = []

    def report_it_damaged_when_it_is_there() -> bool:
        if world.store.exists(1) and not reported:
            reported.append(world.store.fetch(1))
            damage(world.store, 1)
            world.mailbox.bad_chunks |= {1}
        return len(world.of(ChunkEvent)) == 9

    world.run(finished=report_it_damaged_when_it_is_there)
    assert len(world.of(SetAsideEvent)) == 1
    assert world.store.fetch(1).sequences.loss_mask_SL.any(axis=1).tolist() == [
        True,
        False,
        True,
        True,
    ]


def damage(store: ChunkStore, number: int) -> None:
    blobs = store.blobs
    data = bytearray(blobs.read(store.key(number)))
    data[-1] ^= 1
    blobs.replace(store.key(number), bytes(data))


def test_chunks_that_a_power_cut_left_empty_or_cut_are_made_again_when_a_pool_begins(
    tmp_path: Path,
) -> None:
    first = World(num_chunks=6, url=str(tmp_path))
    first.run()
    for number, size in ((2, 0), (4, 300)):
        path = tmp_path / first.store.key(number)
        path.write_bytes(path.read_bytes()[:size])
    second = World(num_chunks=6, url=str(tmp_path))
    second.run()
    second.assert_all_is_there()
    assert second.crew.computed == [2, 4]
    assert [row.chunk for row in second.of(RepairEvent)] == [2, 4]
    assert not any(row.duplicate for row in second.of(ChunkEvent))


def test_two_readers_that_report_the_same_chunk_have_it_repaired_once() -> None:
    world = World(num_chunks=6)
    told: list[float] = []

    def report_twice() -> bool:
        if not told and world.store.exists(2):
            damage(world.store, 2)
            world.mailbox.bad_chunks |= {2}
            told.append(world.crew.now)
        if told:
            # the other reader, again and again, until it is repaired and after
            world.mailbox.bad_chunks |= {2}
        return bool(told) and world.crew.now > told[0] + 60

    world.run(finished=report_twice)
    world.assert_all_is_there()
    assert [row.chunk for row in world.of(RepairEvent)] == [2]
    assert Counter(row.chunk for row in world.of(ChunkEvent))[2] == 2
    assert len(list(world.store.blobs.under(f"{world.store.folder}/quarantine"))) == 1


def test_a_chunk_that_is_gone_is_made_again_when_a_reader_misses_it() -> None:
    world = World(num_chunks=6)
    deleted: list[int] = []

    def delete_one() -> bool:
        if not deleted and len(world.of(ChunkEvent)) == 6:
            world.store.delete(3)
            deleted.append(3)
            world.mailbox.bad_chunks |= {3}
        return len(world.of(ChunkEvent)) == 7

    world.run(finished=delete_one)
    world.assert_all_is_there()
    assert not world.of(RepairEvent)


def test_behind_a_closed_window_nothing_is_made_and_the_slowest_reader_decides() -> None:
    world = World(window=3)
    seen: list[int] = []

    def finished() -> bool:
        if world.crew.now > 1100 + 100 * len(seen):
            seen.append(max(world.store.published(), default=-1) + 1)
            world.mailbox.cursors["fast"] = NUM_CHUNKS
            world.mailbox.cursors["slow"] = len(seen)
        return len(seen) > NUM_CHUNKS

    world.run(readers=("fast", "slow"), finished=finished)
    assert seen == [min(3 + cursor, NUM_CHUNKS) for cursor in range(NUM_CHUNKS + 1)]
    assert not world.last.hedged


def test_teachers_wait_with_a_slow_or_full_store_and_hold_no_more_than_two_chunks_each() -> None:
    """Publishing takes ten minutes for a while; the backlog stays with the teachers, and none of it
    is lost or made twice."""
    world = World(num_chunks=60, teacher={"lease_timeout_s": 2000.0})
    world.crew.seconds = lambda _teacher, _item: 600.0 if world.crew.now < 2000 else 10.0
    most: list[int] = []

    def finished() -> bool:
        most.append(world.crew.num_submitted - len(world.of(ChunkEvent)))
        return True

    world.run(finished=finished)
    world.assert_all_is_there()
    assert world.crew.most_held == 2
    assert max(most) == 2 * 4
    assert Counter(world.crew.computed) == Counter(range(60))


def test_one_chunk_is_published_while_the_next_is_computed() -> None:
    world = World(teacher={"max_replicas": 1})
    world.crew.publish_s = 9.0
    world.run()
    world.assert_all_is_there()
    assert world.crew.now == 1000 + 5 + NUM_CHUNKS * 10 + 9


def test_a_store_slower_than_the_teacher_sets_the_pace_and_two_chunks_are_held_at_most() -> None:
    world = World(teacher={"max_replicas": 1})
    world.crew.publish_s = 25.0
    world.run()
    world.assert_all_is_there()
    assert world.crew.now == 1000 + 5 + 10 + NUM_CHUNKS * 25
    assert world.crew.most_held == 2


def test_what_kills_its_teacher_is_found_although_another_chunk_is_published_meanwhile() -> None:
    """Uploads take longer than the work that kills, so one is under way at every death."""
    world = World(num_chunks=6, teacher={"max_replicas": 1})
    world.crew.publish_s = 15.0
    world.crew.fate = lambda _teacher, item: Death("killed") if touches(item, 9) else None
    world.run()
    world.assert_all_is_there()
    assert [row.sequences for row in world.of(SetAsideEvent)] == [[9]]
    # the chunk and its sequence were tried six times each, all the others once or twice
    assert Counter(world.crew.begun)[2] == 6 + 1
    assert all(world.crew.begun.count(number) <= 2 for number in (0, 3, 4, 5))


def test_a_teacher_on_a_draining_machine_ends_with_what_it_computes_and_what_it_publishes() -> None:
    world = World(teacher={"max_replicas": 1})
    world.crew.nodes = {"a": 1}
    world.crew.publish_s = 9.0
    # chunk 0 is computed from 1005 to 1015 and published until 1024, chunk 1 until 1025 and 1034
    world.crew.at(1020.0, partial(world.notice, "a", seconds=60.0))
    world.crew.at(1040.0, partial(world.crew.add_node, "b", 1))
    published: list[set[int]] = []
    world.crew.at(1039.0, lambda: published.append(world.store.published()))
    world.run()
    world.assert_all_is_there()
    assert published == [{0, 1}]
    assert Counter(world.crew.begun) == Counter(range(NUM_CHUNKS))


def test_a_store_that_refuses_for_long_ends_the_run_in_its_own_words_and_blames_no_chunk() -> None:
    world = World()
    world.crew.fate = lambda _teacher, _item: StoreUnavailable("the disk is full")
    with pytest.raises(StoreError, match="the disk is full"):
        world.run()
    assert not world.of(SetAsideEvent)


def test_a_store_that_refuses_for_a_while_is_outlasted() -> None:
    world = World()
    world.crew.fate = lambda _teacher, _item: (
        StoreUnavailable("busy") if world.crew.now < 1020 else None
    )
    world.run()
    world.assert_all_is_there()
    assert world.last.failures == 0


events = st.lists(
    st.tuples(
        st.floats(0, 400),
        st.sampled_from(["die", "remove", "preempt", "drain", "add", "damage", "hang"]),
        st.integers(0, 9),
    ),
    max_size=25,
)


@given(
    events=events,
    poison=st.sets(st.integers(0, 4 * 12 - 1), max_size=2),
    seed=st.integers(0, 9),
    publish_s=st.sampled_from([0.0, 12.0]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_every_chunk_is_there_and_only_poison_is_set_aside(
    events: list[tuple[float, str, int]], poison: set[int], seed: int, publish_s: float
) -> None:
    world = World(num_chunks=12, teacher={"lease_timeout_s": 200.0})
    world.crew.publish_s = publish_s
    world.crew.nodes = {"a": 2, "b": 1}
    random = np.random.default_rng(seed)
    hanging: set[int] = set()
    world.crew.seconds = lambda teacher, _item: (
        1e7 if teacher in hanging else float(random.exponential(15.0))
    )
    world.crew.fate = lambda _teacher, item: (
        ValueError("poison") if any(touches(item, bad) for bad in poison) else None
    )

    def befall(what: str, which: int) -> None:
        nodes, crew = [*world.crew.nodes], world.crew
        teachers = [teacher for node in nodes for teacher in crew.teachers_on(node)]
        if what == "add":
            crew.add_node(f"node-{crew.now}-{which}", 1 + which % 3)
        elif what == "damage" and (there := sorted(world.store.published())):
            number = there[which % len(there)]
            damage(world.store, number)
            world.mailbox.bad_chunks |= {number}
        elif what in ("remove", "preempt") and len(nodes) > 1:
            crew.remove_node(nodes[which % len(nodes)], preempted=what == "preempt")
        elif what == "drain" and len(nodes) > 1:
            world.notice(nodes[which % len(nodes)], seconds=30.0)
        elif what == "die" and teachers:
            crew.die(teachers[which % len(teachers)])
        elif what == "hang" and teachers:
            hanging.add(teachers[which % len(teachers)])

    for time, what, which in events:
        world.crew.at(1000 + time, partial(befall, what, which))
    world.run(finished=lambda: world.crew.now > 1500, limit_s=50_000)
    world.assert_all_is_there()
    set_aside = {sequence for row in world.of(SetAsideEvent) for sequence in row.sequences}
    assert set_aside == poison
    for sequence in range(4 * 12):
        number, row = divmod(sequence, 4)
        assert world.store.fetch(number).sequences.loss_mask_SL[row].any() == (
            sequence not in poison
        )
