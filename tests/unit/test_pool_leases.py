"""The lease table: whatever happens to teachers and chunks, each chunk ends published or set aside,
in reading order, within the window."""

from collections.abc import Callable, Set
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stillhouse.pool.leases import Lease, LeaseTable
from stillhouse.pool.poison import Budget, SetAside

MOST_CHUNKS = 8
NUM_ROWS = 3
TIMEOUT_S = 100.0


def table_of(order: list[int], *, settled: Set[int] = frozenset(), **budget: Any) -> LeaseTable:
    whole: dict[str, Any] = {"max_failures": 2, "max_set_aside": 4, "timeout_s": TIMEOUT_S} | budget
    there = np.array([number in settled for number in order], dtype=bool)
    return LeaseTable(
        order, settled=there, num_rows=lambda _number: NUM_ROWS, budget=Budget(**whole)
    )


class LeaseMachine(RuleBasedStateMachine):
    """Random teachers against the table. Some rows are poison: they raise, or kill whoever touches
    them, always and alone.

    Machines that die, clocks that run out and chunks that are damaged afterwards come on top, as
    often as they like.
    """

    @initialize(
        order=st.permutations(range(100, 100 + MOST_CHUNKS)),
        size=st.integers(0, MOST_CHUNKS),
        there=st.sets(st.integers(100, 107)),
        poison=st.dictionaries(
            st.tuples(st.integers(100, 107), st.integers(0, NUM_ROWS - 1)),
            st.sampled_from(["raises", "kills"]),
            max_size=4,
        ),
    )
    def begin(
        self, order: list[int], size: int, there: set[int], poison: dict[tuple[int, int], str]
    ) -> None:
        self.order = order[:size]
        self.published = there & set(self.order)
        self.poison = {place: how for place, how in poison.items() if place[0] in self.order}
        self.set_aside: dict[int, set[int]] = {}
        self.out: list[Lease] = []
        self.void_before: dict[
            int, int
        ] = {}  # leases that are older than the damage to their chunk
        self.limit = 0
        self.now = 0.0
        self.table = table_of(self.order, settled=self.published)

    @rule(ahead=st.integers(0, MOST_CHUNKS))
    def move_the_window(self, ahead: int) -> None:
        self.limit = ahead

    @rule(seconds=st.sampled_from([1.0, 10.0, TIMEOUT_S]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds
        expired = self.table.expire(self.now)
        assert all(lease.deadline <= self.now for lease in expired)

    @rule(teacher=st.integers(0, 3))
    def lease(self, teacher: int) -> None:
        self.take(self.table.lease(teacher, limit=self.limit, now=self.now))

    @rule(teacher=st.integers(0, 3))
    def hedge(self, teacher: int) -> None:
        lease = self.table.hedge(teacher, now=self.now)
        if lease is not None:
            others = [
                other
                for other in self.out
                if other.work == lease.work and other.deadline > self.now
            ]
            assert len([other for other in others if other.holder != teacher]) >= 1
            self.take(lease)

    def take(self, lease: Lease | None) -> None:
        if lease is None:
            return
        assert self.order.index(lease.chunk) < self.limit or any(
            other.work == lease.work for other in self.out
        )
        assert lease.chunk not in self.published
        assert lease.left_out == self.set_aside.get(lease.chunk, set())
        self.out.append(lease)

    @precondition(lambda self: self.out)
    @rule(which=st.integers(0, 99))
    def finish(self, which: int) -> None:
        """The teacher does what it was asked to, and meets the poison in it."""
        lease = self.out.pop(which % len(self.out))
        touched = (
            {lease.trial} if lease.trial is not None else set(range(NUM_ROWS)) - lease.left_out
        )
        met = {
            self.poison[lease.chunk, row] for row in touched if (lease.chunk, row) in self.poison
        }
        if "kills" in met:
            self.note(self.table.lose(lease, "poison"))
        elif met:
            self.note(self.table.fail(lease, "poison"))
        elif lease.trial is not None:
            self.note(self.table.passed(lease))
        else:
            self.table.publish(lease, now=self.now)
            if lease.id >= self.void_before.get(lease.chunk, 0):
                self.published.add(lease.chunk)

    @precondition(lambda self: self.out)
    @rule(which=st.integers(0, 99))
    def give_back(self, which: int) -> None:
        self.table.give_back(self.out.pop(which % len(self.out)))

    @precondition(lambda self: self.out)
    @rule(which=st.integers(0, 99))
    def lose_the_machine(self, which: int) -> None:
        self.note(self.table.lose(self.out.pop(which % len(self.out)), "preempted", blame=False))

    @rule(number=st.integers(100, 108))
    def reopen(self, number: int) -> None:
        assert self.table.reopen(number, 999) == (number in self.published)
        if number in self.published:
            self.void_before[number] = max((lease.id for lease in self.out), default=-1) + 1
        self.published.discard(number)

    def note(self, found: SetAside | None) -> None:
        if found is not None:
            assert all((found.chunk, row) in self.poison for row in found.rows)
            self.set_aside[found.chunk] = set(found.rows)

    @invariant()
    def the_counts_are_right(self) -> None:
        table = self.table
        assert (table.num_wanted, table.num_settled, table.num_out) == (
            len(self.order),
            len(self.published),
            len(self.out),
        )
        assert table.num_leased <= len({lease.work for lease in self.out})
        assert table.done == (set(self.order) == self.published)

    def teardown(self) -> None:
        """However it stands, patient teachers end it: every chunk is published, and exactly the
        poison that was met is set aside."""
        if not hasattr(self, "table"):
            return
        self.limit = len(self.order)
        for _ in range(10_000):
            if self.table.done:
                break
            self.lease(9)
            if self.out:
                self.finish(0)
        assert self.table.done
        assert self.published == set(self.order)
        for number, rows in self.set_aside.items():
            assert rows == {row for row in range(NUM_ROWS) if (number, row) in self.poison}
        assert self.table.lease(9, limit=self.limit, now=self.now) is None
        assert self.table.num_leased == 0


LeaseMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestLeaseTable = LeaseMachine.TestCase


def lease_of(
    table: LeaseTable, holder: int = 0, *, limit: int | None = None, now: float = 0.0
) -> Lease:
    lease = table.lease(holder, limit=table.num_wanted if limit is None else limit, now=now)
    assert lease is not None
    return lease


def hedge_of(table: LeaseTable, holder: int, *, now: float) -> Lease:
    hedge = table.hedge(holder, now=now)
    assert hedge is not None
    return hedge


def test_a_chunk_that_comes_back_goes_first_again() -> None:
    table = table_of([5, 3, 9])
    first, second = lease_of(table, limit=2), lease_of(table, limit=2)
    assert (first.chunk, second.chunk, table.lease(0, limit=2, now=0)) == (5, 3, None)
    assert table.held_back(limit=2)
    table.give_back(first)
    again = lease_of(table, limit=2)
    assert again.chunk == 5
    table.publish(again, now=1)
    table.fail(second, "ValueError: no")
    assert table.reopen(5)
    assert [lease_of(table).chunk for _ in range(3)] == [5, 3, 9]


def test_work_that_is_late_is_given_to_another_and_the_late_one_is_still_welcome() -> None:
    table = table_of([7])
    slow = lease_of(table, 0)
    assert table.expire(TIMEOUT_S - 1) == []
    assert table.expire(TIMEOUT_S) == [slow]
    other = lease_of(table, 1, now=TIMEOUT_S)
    assert other.chunk == 7
    table.publish(slow, now=TIMEOUT_S + 1)
    assert table.done
    table.publish(other, now=TIMEOUT_S + 2)  # a duplicate, which the store refused
    assert (table.tally.late, table.num_settled, table.num_out) == (1, 1, 0)


def test_slow_work_is_given_to_one_idle_teacher_more_and_to_no_third() -> None:
    table = table_of(list(range(8)))
    for now in range(6):
        table.publish(lease_of(table, 0, now=10.0 * now), now=10.0 * now + 10)
    slow, recent = lease_of(table, 0, now=60), lease_of(table, 1, now=75)
    assert table.hedge(2, now=80) is None  # not twice the usual ten seconds
    assert table.hedge(0, now=81) is None  # its own
    hedge = hedge_of(table, 2, now=81)
    assert (hedge.chunk, hedge.holder) == (slow.chunk, 2)
    assert table.hedge(3, now=90) is None
    table.give_back(hedge)
    assert hedge_of(table, 3, now=90).chunk == slow.chunk
    table.publish(slow, now=91)
    assert hedge_of(table, 4, now=200).chunk == recent.chunk
    assert table.tally.hedged == 3


def raise_until_examined(table: LeaseTable, times: int = 2) -> None:
    for _ in range(times):
        assert table.fail(lease_of(table), "IndexError: no") is None


def test_a_row_that_raises_is_found_and_set_aside() -> None:
    table = table_of([7, 8])
    raise_until_examined(table)
    found = None
    tried = []
    while found is None:
        lease = lease_of(table)
        assert lease.chunk == 7
        tried.append(lease.trial)
        found = table.fail(lease, "IndexError: row 1") if lease.trial == 1 else table.passed(lease)
    assert tried == [0, 1, 2, 1]
    assert found == SetAside(7, (1,), "IndexError: row 1")
    again = lease_of(table)
    assert (again.chunk, again.trial, again.left_out) == (7, None, frozenset([1]))


def test_deaths_of_machines_that_said_so_count_for_nothing() -> None:
    table = table_of([7])
    for _ in range(50):
        table.lose(lease_of(table), "preempted", blame=False)
    assert lease_of(table).trial is None
    assert table.tally.losses == 50


def test_failures_of_different_chunks_do_not_add_up() -> None:
    table = table_of(list(range(10)))
    leases = [lease_of(table) for _ in range(10)]
    for lease in leases:
        table.fail(lease, "once each")
    assert table.tally.failures == 10
    assert [lease_of(table).trial for _ in range(10)] == [None] * 10


def test_a_chunk_that_comes_late_after_all_ends_the_search_for_its_poison() -> None:
    table = table_of([7])
    slow = lease_of(table, 0)
    table.expire(TIMEOUT_S)
    for _ in range(2):
        table.fail(lease_of(table, 1, now=TIMEOUT_S), "no")
    trial = lease_of(table, 1, now=TIMEOUT_S)
    assert trial.trial == 0
    table.publish(slow, now=TIMEOUT_S + 1)
    assert table.done
    assert table.passed(trial) is None
    assert table.lease(1, limit=1, now=TIMEOUT_S + 2) is None


def test_a_publication_from_before_the_damage_does_not_count_after_it() -> None:
    table = table_of([7])
    slow = lease_of(table, 0)
    table.expire(TIMEOUT_S)
    table.publish(lease_of(table, 1, now=TIMEOUT_S), now=TIMEOUT_S)
    assert table.reopen(7)
    # it lost the race for the chunk that is in quarantine now
    table.publish(slow, now=TIMEOUT_S + 1)
    assert not table.done
    assert lease_of(table).chunk == 7


@pytest.mark.parametrize("end", [LeaseTable.find, LeaseTable.give_back, LeaseTable.passed])
def test_nobody_ends_a_lease_twice(end: Callable[[LeaseTable, Lease], object]) -> None:
    table = table_of([1, 2])
    lease = lease_of(table)
    table.give_back(lease)
    with pytest.raises(KeyError):
        end(table, lease)
