"""The search for poison rows: rows that no worker can compute are found and set aside; a failure
that rows alone do not explain ends the run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.errors import TeacherError
from stillhouse.pool.backlog import Work
from stillhouse.pool.poison import DIED, RAISED, Budget, PoisonSearch, Ruling, SetAside

NUM_ROWS = 3
FIRST, SECOND = Work(0), Work(1)  # chunks 7 and 8


def search_of(**budget: int) -> PoisonSearch:
    return PoisonSearch(
        lambda _chunk: NUM_ROWS,
        Budget(budget.get("max_failures", 2), budget.get("max_set_aside", 4), timeout_s=100.0),
    )


def rows_of(chunk: Work) -> list[Work]:
    return [Work(chunk.position, row) for row in range(NUM_ROWS)]


def accuse(search: PoisonSearch, work: Work, *, weight: int = RAISED, reason: str = "no") -> Ruling:
    assert search.wants(work)
    return search.accuse(work, weight, chunk=7 + work.position, reason=reason)


def acquit(search: PoisonSearch, work: Work) -> Ruling:
    assert search.wants(work)
    return search.acquit(work, chunk=7 + work.position)


def take_apart(search: PoisonSearch, chunk: Work) -> None:
    assert accuse(search, chunk) == Ruling()
    assert accuse(search, chunk) == Ruling([chunk], rows_of(chunk))


def test_a_chunk_that_fails_twice_is_wanted_row_by_row_and_no_more_as_a_whole() -> None:
    search = search_of()
    take_apart(search, FIRST)
    assert not search.wants(FIRST)
    assert all(search.wants(row) for row in rows_of(FIRST))
    assert search.wants(SECOND)


def test_deaths_are_forgiven_three_times_as_long_as_errors() -> None:
    search = search_of()
    for _ in range(5):
        assert accuse(search, FIRST, weight=DIED) == Ruling()
    assert accuse(search, FIRST, weight=DIED).opened == rows_of(FIRST)


@given(st.sets(st.integers(0, NUM_ROWS - 1)))
def test_exactly_the_rows_that_fail_are_set_aside_and_the_chunk_is_wanted_again(
    poison: set[int],
) -> None:
    search = search_of()
    take_apart(search, FIRST)
    for row in rows_of(FIRST):
        if row.row in poison:
            assert accuse(search, row) == Ruling()
    rulings = [
        accuse(search, row, reason="IndexError") if row.row in poison else acquit(search, row)
        for row in rows_of(FIRST)
    ]
    assert [ruling.closed for ruling in rulings] == [[row] for row in rows_of(FIRST)]
    assert [ruling.opened for ruling in rulings] == [(), (), [FIRST]]
    assert rulings[-1].set_aside == (
        SetAside(7, tuple(sorted(poison)), "IndexError") if poison else None
    )
    assert search.left_out(0) == poison
    assert search.num_set_aside == len(poison)
    assert search.wants(FIRST)


def test_a_chunk_that_fails_though_its_rows_do_not_ends_the_run_by_name() -> None:
    search = search_of()
    take_apart(search, FIRST)
    for row in rows_of(FIRST):
        assert acquit(search, row).set_aside is None
    accuse(search, FIRST, reason="OutOfMemoryError: first")
    with pytest.raises(
        TeacherError,
        match=r"chunk 7 cannot be made although .* ended with: OutOfMemoryError: second\. Every "
        r"other",
    ):
        accuse(search, FIRST, reason="OutOfMemoryError: second")


def test_a_failure_of_everything_is_not_taken_for_poison() -> None:
    search = search_of(max_set_aside=2)
    take_apart(search, FIRST)
    first, second, third = rows_of(FIRST)
    accuse(search, first, reason="RuntimeError: CUDA")
    accuse(search, second, reason="RuntimeError: CUDA")
    with pytest.raises(
        TeacherError,
        match=r"chunk 7 .* \(rows 0, 1, 2\), last with: RuntimeError: CUDA\. With 0 set aside .* "
        r"which is 2",
    ):
        accuse(search, third, reason="RuntimeError: CUDA")


def test_more_poison_than_may_be_set_aside_ends_the_run() -> None:
    search = search_of(max_set_aside=1)
    take_apart(search, FIRST)
    first, second, third = rows_of(FIRST)
    accuse(search, third, reason="poison")
    acquit(search, first)
    acquit(search, second)
    assert accuse(search, third, reason="poison").set_aside is not None
    take_apart(search, SECOND)
    with pytest.raises(TeacherError, match="chunk 8"):
        accuse(search, rows_of(SECOND)[0], reason="poison")


def test_a_chunk_that_is_published_after_all_ends_the_search_in_it() -> None:
    search = search_of()
    take_apart(search, FIRST)
    first, *others = rows_of(FIRST)
    acquit(search, first)
    assert sorted(search.end(0)) == [FIRST, *others]
    assert not any(search.wants(row) for row in rows_of(FIRST))
    assert search.weight_against(FIRST) == 0
