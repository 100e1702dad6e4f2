"""Several students read one store while teachers fill it: each gets every chunk, and exactly the
chunks that no student reads again are deleted."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.chunks import small_recipe
from helpers.simulation import Mailbox, SimulatedCrew, item_of, publish
from stillhouse.config import TeacherSection
from stillhouse.errors import StoreError
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.pool.retention import Retention
from stillhouse.store import ChunkStore, Consumer
from stillhouse.store.consumers import commit, join
from stillhouse.student.job import order_of
from stillhouse.student.loader import chunks_read_ahead
from stillhouse.student.order import Order
from stillhouse.teacher.pool import comparison, limits_of
from stillhouse.tracking import ChunkEvent, RunEvent

RECIPE = small_recipe(num_sequences=4 * 24, sequence_length=6)
STEPS_PER_EPOCH = 12  # of eight sequences, so two chunks


def reader(name: str, *, epochs: int = 1, seed: int = 0) -> Consumer:
    return Consumer(
        name=name,
        global_batch_sequences=8,
        seed=seed,
        window_chunks=2,
        total_steps=epochs * STEPS_PER_EPOCH,
        committed_step=0,
    )


@dataclass
class Student:
    """Reads as a real one would: a step when all its chunks are there, and a commit after every
    `every` steps."""

    store: ChunkStore
    reader: Consumer
    every: int = 3
    step: int = 0
    commits: bool = True

    @property
    def order(self) -> Order:
        return order_of(self.reader, self.store.recipe)

    @property
    def done(self) -> bool:
        return self.step == self.reader.total_steps

    def read(self) -> None:
        if self.done:
            return
        for number in np.unique(
            self.order.sequences(self.step) // self.store.recipe.chunk_sequences
        ):
            if not self.store.exists(int(number)):
                return
        self.step += 1
        if self.commits and (self.step % self.every == 0 or self.done):
            self.commit(self.step)

    def commit(self, step: int) -> None:
        self.step, self.reader = step, replace(self.reader, committed_step=step)
        commit(self.store, self.reader)


class Killed(Exception):
    pass


@dataclass
class Run:
    """A pool and the students of its run. `steps` moves all on by a round of the pool's."""

    store: ChunkStore
    students: list[Student]
    own: int = 1
    window: int = 6
    deletes: bool = True

    def __post_init__(self) -> None:
        self.crew = SimulatedCrew(
            publish=lambda item: publish(self.store, item), is_there=self.store.exists
        )
        self.rows: list[RunEvent] = []
        self.mailbox = Mailbox()
        self.most_there = 0
        for student in self.students:
            join(self.store, student.reader)

    def record(self, row: RunEvent) -> None:
        self.rows.append(row)

    @property
    def made(self) -> list[int]:
        return [row.chunk for row in self.rows if isinstance(row, ChunkEvent)]

    def retention(self) -> Retention:
        first = self.students[0].order
        return Retention(
            self.store,
            own=[student.reader.name for student in self.students[: self.own]],
            deletes=self.deletes,
            least_ahead=chunks_read_ahead(first),
            done_after=lambda reader: order_of(reader, RECIPE).steps_until_done_with(
                reader.total_steps
            ),
            position=lambda reader: (
                order_of(reader, RECIPE).chunks_finished(reader.committed_step)
                if reader.seed == first.seed
                else None
            ),
        )

    def go(self, *, kill_after_steps: int | None = None) -> None:
        """Until every student is done; or until the driver is killed, once the first one has taken
        so many steps."""
        first = self.students[0]
        pool = Dispatcher(
            self.crew,
            limits_of(TeacherSection(model="simulated", max_replicas=2)),
            compare=comparison(RECIPE),
            store=self.store,
            order=first.order.chunks_in_reading_order(first.reader.total_steps),
            item_of=lambda number: item_of(RECIPE, number),
            window_chunks=self.window,
            journal=self,
            retention=self.retention(),
            clock=self.crew.clock,
            wall=self.crew.clock,
        )

        def finished() -> bool:
            for student in self.students:
                student.read()
            self.mailbox.cursors["student"] = first.order.chunks_finished(first.step)
            self.most_there = max(self.most_there, len(self.store.published()))
            if first.step == kill_after_steps:
                raise Killed
            assert self.crew.now < 50_000
            return all(student.done for student in self.students) and self.crew.now > 1100

        with suppress(Killed):
            pool.run(readers=("student",), coordinator=self.mailbox, finished=finished)


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore.create(str(tmp_path / "store"), RECIPE)


def test_a_read_and_committed_chunk_is_deleted_and_the_store_stays_small(store: ChunkStore) -> None:
    run = Run(store, [Student(store, reader("one"))])
    run.go()
    assert run.students[0].done
    assert store.published() == set()
    assert sorted(run.made) == list(range(24))  # each once
    # the window, what is read but not committed, and a look or two
    assert run.most_there <= 6 + 2 * 3 + 8


def test_retain_all_deletes_nothing(store: ChunkStore) -> None:
    run = Run(store, [Student(store, reader("one"))], deletes=False)
    run.go()
    assert store.published() == set(range(24))


def test_with_several_epochs_nothing_goes_before_the_last_one_has_read_it(
    store: ChunkStore,
) -> None:
    run = Run(store, [Student(store, reader("one", epochs=3))])
    run.go()
    assert run.students[0].done
    assert sorted(run.made) == list(range(24))
    assert run.most_there == 24
    assert store.published() == set()


def test_the_slowest_of_two_students_decides_and_both_read_everything(store: ChunkStore) -> None:
    """The second has another seed, another pace, and reads twice."""
    run = Run(
        store,
        [Student(store, reader("one")), Student(store, reader("two", epochs=2, seed=9), every=4)],
    )
    run.go()
    assert all(student.done for student in run.students)
    assert sorted(run.made) == list(range(24))
    assert store.published() == set()


def test_a_control_that_reads_after_the_student_finds_everything(store: ChunkStore) -> None:
    student = Student(store, reader("student"))
    control = Student(store, reader("control"))
    run = Run(store, [student], own=1)
    join(store, control.reader)
    run.own = 1
    run.go()
    assert student.done
    assert store.published() == set(range(24))
    both = Run(store, [student, control], own=2)
    both.go()
    assert control.done
    assert both.made == []
    assert store.published() == set()


def test_a_run_that_goes_on_does_not_make_again_what_is_behind_it(store: ChunkStore) -> None:
    student = Student(store, reader("one"))
    first = Run(store, [student])
    first.go(kill_after_steps=8)
    assert student.reader.committed_step == 6
    assert len(store.published()) < len(first.made)
    student.step = student.reader.committed_step  # what was not committed is read again
    second = Run(store, [student])
    second.go()
    assert student.done
    assert second.made
    assert not set(first.made) & set(second.made)


def test_a_reader_that_falls_back_behind_deleted_chunks_gets_them_again(store: ChunkStore) -> None:
    """Its newest checkpoints turned out damaged, and it begins anew."""
    student = Student(store, reader("one"))
    run = Run(store, [student])
    run.go(kill_after_steps=11)
    deleted = set(run.made) - store.published()
    assert deleted
    student.step = student.reader.committed_step
    again = Run(store, [student])
    again.crew.at(again.crew.now + 20, lambda: student.commit(0))
    again.go()
    assert student.done
    assert set(again.made) >= deleted
    assert store.published() == set()


def test_nothing_is_deleted_while_somebody_reads_who_is_not_understood(store: ChunkStore) -> None:
    run = Run(store, [Student(store, reader("one"))])
    stranger = Path(store.url) / store.folder / "readers" / "stranger.json"
    run.crew.at(1001, lambda: stranger.write_text('{"version":2}'))
    run.go()
    assert store.published() == set(range(24))
    with pytest.raises(
        StoreError,
        match=r'store\.retain is "until-read", but it is unknown which chunks .*stranger\.json',
    ):
        run.go()


def test_nothing_is_deleted_once_an_own_record_is_gone(store: ChunkStore) -> None:
    run = Run(store, [Student(store, reader("one"), commits=False), Student(store, reader("two"))])
    run.crew.at(1001, lambda: (Path(store.url) / store.folder / "readers" / "one.json").unlink())
    run.go()
    assert run.students[1].done
    assert store.published() == set(range(24))


def test_who_joins_between_two_looks_is_seen_before_anything_goes(store: ChunkStore) -> None:
    run = Run(store, [Student(store, reader("one"))])
    for number in range(24):
        publish(store, item_of(RECIPE, number))
    retention = run.retention()
    retention.begin(np.arange(24))
    run.students[0].commit(STEPS_PER_EPOCH)
    assert retention.look() == []
    assert store.published() == set(range(24))  # the first look only marks
    join(store, reader("two", seed=1))
    retention.look()
    retention.look()
    assert store.published() == set(range(24))
    commit(store, replace(reader("two", seed=1), committed_step=STEPS_PER_EPOCH))
    retention.look()
    retention.look()
    assert store.published() == set()


def test_readers_of_other_runs_hold_teachers_back_but_never_starve_an_own_one(
    store: ChunkStore,
) -> None:
    run = Run(store, [Student(store, reader("one"))])
    retention = run.retention()
    commit(store, replace(reader("slow"), committed_step=2))
    retention.begin(np.arange(0))
    # its own student's next step comes first
    assert retention.limit(4, 6) == 4 + chunks_read_ahead(run.students[0].order)
    assert retention.limit(8, 10) == 4 + 10  # two steps of two chunks each
    commit(store, replace(reader("slow"), committed_step=STEPS_PER_EPOCH))
    retention.look()
    assert retention.limit(4, 10) == 14
    commit(store, replace(reader("another-order", seed=5), committed_step=2))
    retention.look()
    assert retention.limit(4, 10) == 14


@given(
    num_sequences=st.integers(1, 60),
    chunk_sequences=st.integers(1, 7),
    batch=st.integers(1, 9),
    window=st.integers(1, 5),
    seed=st.integers(0, 99),
    num_steps=st.integers(0, 60),
)
@settings(max_examples=150, deadline=None)
def test_a_chunk_is_done_with_after_its_last_use_and_not_much_later(
    num_sequences: int, chunk_sequences: int, batch: int, window: int, seed: int, num_steps: int
) -> None:
    order = Order(num_sequences, chunk_sequences, batch, seed, window)
    last_use = np.zeros(order.num_chunks, dtype=np.int64)
    for step in range(num_steps):
        last_use[order.sequences(step) // chunk_sequences] = step + 1
    done = order.steps_until_done_with(num_steps)
    assert (done >= last_use).all()
    if num_steps % order.steps_per_epoch == 0:  # else a group that was only begun is all kept
        assert (done - last_use <= -(-window * chunk_sequences // batch)).all()
