"""The lease table: whatever happens to teachers and chunks, each chunk ends published once, in reading order, within the window."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stillhouse.errors import TeacherError
from stillhouse.teacher.leases import LeaseTable

MOST_CHUNKS = 8


class LeaseMachine(RuleBasedStateMachine):
    """Random teachers against the table; `waiting`, `leased` and `published` are what a person with paper would have written down."""

    @initialize(
        order=st.permutations(range(100, 100 + MOST_CHUNKS)), size=st.integers(0, MOST_CHUNKS), there=st.sets(st.integers(100, 107))
    )
    def begin(self, order: list[int], size: int, there: set[int]) -> None:
        self.order = order[:size]
        self.published = there & set(self.order)
        self.leased: list[int] = []
        self.num_raised = dict.fromkeys(self.order, 0)
        self.num_lost = dict.fromkeys(self.order, 0)
        self.limit = 0
        self.table = LeaseTable(self.order, published=there, max_failures=3)

    @property
    def waiting(self) -> list[int]:
        return [number for number in self.order if number not in self.published and number not in self.leased]

    @rule(ahead=st.integers(0, MOST_CHUNKS))
    def move_the_window(self, ahead: int) -> None:
        self.limit = ahead

    @rule()
    def lease(self) -> None:
        expected = next(iter(self.waiting), None)
        if expected is not None and self.order.index(expected) >= self.limit:
            expected = None
        assert self.table.lease(limit=self.limit) == expected
        if expected is not None:
            self.leased.append(expected)

    @precondition(lambda self: self.leased)
    @rule(which=st.integers(0, 99))
    def publish(self, which: int) -> None:
        number = self.leased.pop(which % len(self.leased))
        self.table.publish(number)
        self.published.add(number)

    @precondition(lambda self: self.leased)
    @rule(which=st.integers(0, 99))
    def hand_back(self, which: int) -> None:
        self.table.hand_back(self.leased.pop(which % len(self.leased)))

    @precondition(lambda self: any(self.num_raised[number] < 2 for number in self.leased))
    @rule(which=st.integers(0, 99))
    def fail(self, which: int) -> None:
        sound = [number for number in self.leased if self.num_raised[number] < 2]
        number = sound[which % len(sound)]
        self.leased.remove(number)
        self.num_raised[number] += 1
        self.table.fail(number, "out of luck")

    @precondition(lambda self: any(self.num_lost[number] < 8 for number in self.leased))
    @rule(which=st.integers(0, 99))
    def lose_the_teacher(self, which: int) -> None:
        alive = [number for number in self.leased if self.num_lost[number] < 8]
        number = alive[which % len(alive)]
        self.leased.remove(number)
        self.num_lost[number] += 1
        self.table.lose(number, "preempted")

    @rule(number=st.integers(100, 108))
    def reopen(self, number: int) -> None:
        assert self.table.reopen(number) == (number in self.published)
        self.published.discard(number)

    @invariant()
    def the_counts_are_right(self) -> None:
        table = self.table
        assert (table.num_wanted, table.num_published, table.num_leased) == (len(self.order), len(self.published), len(self.leased))
        assert table.num_failures == sum(self.num_raised.values())
        assert table.done == (not self.waiting and not self.leased)
        held = bool(self.waiting) and self.order.index(self.waiting[0]) >= self.limit
        assert table.held_back(limit=self.limit) == held

    def teardown(self) -> None:
        """However it stands, patient teachers end it: every chunk is published, those that were waiting in reading order."""
        if not hasattr(self, "table"):
            return
        for number in self.leased:
            self.table.publish(number)
        made = []
        while (number := self.table.lease(limit=len(self.order))) is not None:
            self.table.publish(number)
            made.append(number)
        assert self.table.done
        assert self.table.num_published == len(self.order)
        assert made == [number for number in self.order if number not in self.published and number not in self.leased]


LeaseMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeaseTable = LeaseMachine.TestCase


def test_a_chunk_that_comes_back_goes_first_again():
    table = LeaseTable([5, 3, 9], published=(), max_failures=3)
    assert [table.lease(limit=2), table.lease(limit=2), table.lease(limit=2)] == [5, 3, None]
    table.hand_back(5)
    assert table.lease(limit=2) == 5
    table.publish(5)
    table.fail(3, "ValueError: no")
    assert table.reopen(5)
    assert [table.lease(limit=2), table.lease(limit=2)] == [5, 3]


def test_the_last_failure_allowed_names_the_chunk_and_its_reason():
    table = LeaseTable([7, 8], published=(), max_failures=2)
    assert table.lease(limit=2) == 7
    table.fail(7, "IndexError: first")
    assert table.lease(limit=2) == 7
    with pytest.raises(TeacherError, match=r"chunk 7 failed 2 times, last with: IndexError: second\. Every other published chunk is kept"):
        table.fail(7, "IndexError: second")
    assert table.num_failures == 2


def test_failures_of_different_chunks_do_not_add_up():
    table = LeaseTable(range(10), published=(), max_failures=2)
    for number in range(10):
        assert table.lease(limit=10) == number
    for number in range(10):
        table.fail(number, "once each")
    assert table.num_failures == 10
    assert table.lease(limit=10) == 0


def test_lost_teachers_are_forgiven_until_one_chunk_has_taken_too_many_with_it():
    table = LeaseTable([1, 2], published=(), max_failures=2)
    for _ in range(5):
        assert table.lease(limit=2) == 1
        assert table.lease(limit=2) == 2
        table.lose(1, "killed")
        table.hand_back(2)
    assert table.lease(limit=2) == 1
    with pytest.raises(TeacherError, match="chunk 1 was lost with its teacher 6 times, last with: killed"):
        table.lose(1, "killed")
    assert table.num_failures == 0


@pytest.mark.parametrize("end", [LeaseTable.publish, LeaseTable.hand_back])
def test_nobody_ends_a_lease_that_is_not_held(end):
    table = LeaseTable([1, 2], published=[2], max_failures=1)
    for number in (1, 2, 3):
        with pytest.raises(KeyError):
            end(table, number)
