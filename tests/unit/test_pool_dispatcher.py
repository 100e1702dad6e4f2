"""The pool is generic: it leases blocks of any kind to workers of any kind, which are compared and
journalled by functions that it is given."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import pytest

from helpers.chunks import small_recipe
from helpers.simulation import Mailbox
from stillhouse.errors import TeacherError
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.pool.events import Answered, Died, Event, Passed, Raised, Started
from stillhouse.pool.fleet import Limits
from stillhouse.pool.poison import Budget
from stillhouse.store import ChunkStore
from stillhouse.tracking import PoolEvent, RunEvent, SetAsideEvent

NUM_BLOCKS, NUM_ROWS = 6, 4
_names = itertools.count()


RowT = TypeVar("RowT", bound=RunEvent)


@dataclass(frozen=True)
class Prompts:
    """A work item that is no sequences."""

    block: int
    rows: frozenset[int] = frozenset(range(NUM_ROWS))

    def only(self, row: int) -> "Prompts":
        return replace(self, rows=frozenset([row]))

    def without(self, rows: frozenset[int]) -> "Prompts":
        return replace(self, rows=self.rows - rows)


@dataclass(frozen=True, slots=True)
class WriterEvent(RunEvent):
    kind: ClassVar[str] = "writer"
    number: int
    version: int


@dataclass(frozen=True, slots=True)
class WrittenEvent(RunEvent):
    kind: ClassVar[str] = "written"
    number: int
    block: int
    rows: list[int]


@dataclass(frozen=True)
class WriterReady:
    version: int
    node: str = "a"

    def journal_event(self, worker: int) -> WriterEvent:
        return WriterEvent(worker, self.version)


@dataclass(frozen=True)
class Written:
    item: Prompts
    num_tokens: int = 10

    def journal_event(self, worker: int) -> WrittenEvent:
        return WrittenEvent(worker, self.item.block, sorted(self.item.rows))


@dataclass
class Writers:
    """A crew whose workers do at once what they are asked to. `poison` says which row of which
    block none of them can write."""

    version_of: Callable[[int], int] = lambda _worker: 7
    poison: frozenset[tuple[int, int]] = frozenset()
    mortal: set[int] = field(default_factory=set)  # workers that die of their first work
    waiting: list[Event[WriterReady]] = field(default_factory=list)

    def spawn(self, worker: int) -> None:
        self.waiting.append(Started(worker, WriterReady(self.version_of(worker))))

    def submit(self, worker: int, lease: int, item: Prompts, *, publish: bool) -> None:
        if worker in self.mortal:
            self.waiting.append(Died(worker, "killed"))
        elif any((item.block, row) in self.poison for row in item.rows):
            self.waiting.append(Raised(worker, lease, TeacherError("no words")))
        else:
            self.waiting.append(Answered(worker, lease, Written(item) if publish else Passed()))

    def kill(self, worker: int) -> None:
        self.waiting = [event for event in self.waiting if event.worker != worker]

    def events(self, *, timeout_s: float) -> list[Event[WriterReady]]:
        assert self.waiting or timeout_s > 0
        waiting, self.waiting = self.waiting, []
        return waiting


@dataclass
class Rows:
    rows: list[RunEvent] = field(default_factory=list)

    def record(self, row: RunEvent) -> None:
        self.rows.append(row)


def require_same_version(first: WriterReady, other: WriterReady, worker: int) -> None:
    if first.version != other.version:
        raise TeacherError(f"writer {worker} has version {other.version}, not {first.version}")


def write_all(crew: Writers, *, enough: Callable[[], bool] = lambda: False) -> list[RunEvent]:
    recipe, journal = (
        small_recipe(num_sequences=NUM_BLOCKS * NUM_ROWS, chunk_sequences=NUM_ROWS),
        Rows(),
    )
    limits = Limits(
        min_workers=2,
        max_workers=2,
        watchdog_s=60,
        budget=Budget(max_failures=1, max_set_aside=1, timeout_s=60),
    )
    pool = Dispatcher(
        crew,
        limits,
        compare=require_same_version,
        store=ChunkStore.create(f"memory://writers-{next(_names)}", recipe),
        order=range(NUM_BLOCKS),
        item_of=Prompts,
        window_chunks=2,
        journal=journal,
    )
    pool.run(readers=(), coordinator=Mailbox(), finished=lambda: True, enough=enough)
    return journal.rows


def of(rows: list[RunEvent], kind: type[RowT]) -> list[RowT]:
    return [row for row in rows if isinstance(row, kind)]


def test_workers_that_are_no_teachers_make_every_block_once_and_have_events_of_their_own() -> None:
    rows = write_all(Writers(mortal={1}))
    assert {row.number for row in of(rows, WriterEvent)} >= {0, 1}
    assert sorted(row.block for row in of(rows, WrittenEvent)) == list(range(NUM_BLOCKS))
    last = rows[-1]
    assert isinstance(last, PoolEvent)
    assert (last.published, last.needed, last.losses) == (NUM_BLOCKS, NUM_BLOCKS, 1)


def test_a_row_that_none_of_them_can_make_is_set_aside_and_the_rest_of_its_block_is_made() -> None:
    rows = write_all(Writers(poison=frozenset([(2, 1)])))
    (aside,) = of(rows, SetAsideEvent)
    assert (aside.chunk, aside.sequences) == (2, [2 * NUM_ROWS + 1])
    assert {row.block: row.rows for row in of(rows, WrittenEvent)} == {
        block: [0, 2, 3] if block == 2 else list(range(NUM_ROWS)) for block in range(NUM_BLOCKS)
    }


def test_blocks_that_nobody_waits_for_are_not_made() -> None:
    written: list[int] = []

    @dataclass
    class Counting(Writers):
        def submit(self, worker: int, lease: int, item: Prompts, *, publish: bool) -> None:
            written.append(item.block)
            super().submit(worker, lease, item, publish=publish)

    rows = write_all(Counting(), enough=lambda: len(written) >= 3)
    assert 0 < len(of(rows, WrittenEvent)) < NUM_BLOCKS


def test_a_worker_that_is_not_the_same_as_the_first_ends_the_run() -> None:
    with pytest.raises(TeacherError, match="writer 1 has version 8, not 7"):
        write_all(Writers(version_of=lambda worker: 7 + worker))
