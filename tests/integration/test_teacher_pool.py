"""The teacher pool on real actors: teachers die, chunks rot, a reader stands still, and each chunk
is still made once, in reading order.

Actors take seconds to start. So one pool lives through most of it, and the tests look at what it
left.
"""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.processes import kill_one
from helpers.world import TinyWorld, item_with_tokens
from stillhouse import pipeline
from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.placement import placement
from stillhouse.cluster.processes import Secrets
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.errors import (
    ChangedWeightsError,
    ModelError,
    RecipeError,
    StoreError,
    StudentError,
)
from stillhouse.pipeline import Plan
from stillhouse.pipeline.attempt import attempt
from stillhouse.pool.actor_backend import ActorBackend
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.sequence import WorkItem
from stillhouse.sequences.stored import Work
from stillhouse.store import ChunkStore
from stillhouse.teacher.actor import Ready, TeacherJob, spawn
from stillhouse.teacher.first_answer import require_first_teacher
from stillhouse.teacher.pool import comparison, limits_of
from stillhouse.tracking import (
    ChunkEvent,
    PoolEvent,
    RepairEvent,
    RunEvent,
    SetAsideEvent,
    TeacherEvent,
)
from stillhouse.tracking.log import handed_on

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_CHUNKS = 8  # of the plan's, so that a test takes seconds
WINDOW = 3
PATIENCE_S = 120


@dataclass
class WatchedTracker:
    """A tracker that keeps its rows, and tells whoever waits for one."""

    rows: list[RunEvent] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def record(self, row: RunEvent) -> None:
        with self._changed:
            self.rows.append(row)
            self._changed.notify_all()

    def wait_for(
        self, condition: Callable[[list[RunEvent]], bool], *, unless: Callable[[], bool]
    ) -> None:
        """Until the rows meet the condition; no longer once `unless`, since then nobody writes
        any."""
        with self._changed:
            while not condition(self.rows):
                assert not unless()
                assert self._changed.wait(timeout=PATIENCE_S)

    def wake(self, _finished: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def made(self) -> Counter[int]:
        """What was published so far."""
        chunks = [row for row in self.rows if isinstance(row, ChunkEvent)]
        return Counter(row.chunk for row in chunks if not row.duplicate)

    def require_duplicates_of_hedged_work_alone(self) -> None:
        """Once all is done: what was computed twice was hedged, because a teacher was slow."""
        num_hedged = max(row.hedged for row in self.rows if isinstance(row, PoolEvent))
        duplicates = [row for row in self.rows if isinstance(row, ChunkEvent) and row.duplicate]
        assert len(duplicates) <= num_hedged


def pool_of(
    plan: Plan,
    coordinator: Coordinator,
    *,
    order: list[int],
    journal: WatchedTracker,
    item_of: Callable[[int], Work],
    **teacher: Any,
) -> Dispatcher[Work, Ready]:
    section = plan.config.teacher.model_copy(update=teacher)
    job = TeacherJob(section, plan.recipe, plan.config.store.url, threads=1, notices="off")
    return Dispatcher(
        ActorBackend(
            partial(
                spawn,
                job,
                where=placement(section, {"CPU": 4.0}),
                secrets=Secrets(None),
                coordinator=coordinator,
            )
        ),
        limits_of(section),
        compare=comparison(plan.recipe),
        store=ChunkStore(plan.config.store.url, plan.recipe),
        order=order,
        item_of=item_of,
        window_chunks=WINDOW,
        journal=journal,
    )


def new_plan(tiny_world: TinyWorld, folder: Path) -> Plan:
    plan = tiny_world.plan(folder / "run", store={"url": str(folder / "store")})
    ChunkStore.create(plan.config.store.url, plan.recipe)
    return plan


def poisoned(item: WorkItem) -> WorkItem:
    """A token that no embedding has: looking it up raises in the teacher."""
    token_ids_SL = item.sequences.token_ids_SL.copy()
    token_ids_SL[0, 0] = 1_000_000
    return replace(item, sequences=replace(item.sequences, token_ids_SL=token_ids_SL))


@dataclass
class Story:
    """What is left of a pool of two teachers that lived through a kill, a closed window and reports
    of bad chunks."""

    plan: Plan
    order: list[int]
    journal: WatchedTracker
    published_by_cursor: list[set[int]] = field(default_factory=list)
    row_behind_the_window: PoolEvent | None = None
    bytes_before: dict[int, bytes] = field(default_factory=dict)
    quarantined: list[str] = field(default_factory=list)

    @property
    def store(self) -> ChunkStore:
        return ChunkStore(self.plan.config.store.url, self.plan.recipe)

    def path_of(self, number: int) -> Path:
        return Path(self.store.url) / self.store.key(number)


def has_made(journal: WatchedTracker, chunks: set[int], _rows: list[RunEvent]) -> bool:
    return journal.made().keys() >= chunks


def live_through_it(story: Story, pool: Dispatcher[Work, Ready], coordinator: Coordinator) -> None:
    order, journal = story.order, story.journal
    unwanted = story.plan.chunks[NUM_CHUNKS]
    students_are_done = threading.Event()

    def window_is_closed(rows: list[RunEvent]) -> bool:
        return any(isinstance(row, PoolEvent) and row.window_wait_s > 0 for row in rows)

    with ThreadPoolExecutor() as threads:
        running = threads.submit(
            pool.run,
            readers=["student"],
            coordinator=coordinator,
            finished=students_are_done.is_set,
        )
        running.add_done_callback(journal.wake)
        try:
            journal.wait_for(window_is_closed, unless=running.done)
            story.published_by_cursor.append(story.store.published())
            story.row_behind_the_window = next(
                row for row in reversed(journal.rows) if isinstance(row, PoolEvent)
            )

            story.bytes_before = {
                number: story.path_of(number).read_bytes() for number in order[:WINDOW]
            }
            damaged = bytearray(story.bytes_before[order[0]])
            damaged[-1] ^= 1
            story.path_of(order[0]).write_bytes(damaged)
            for number in (
                order[0],
                order[0],
                order[1],
                order[-1],
                unwanted,
            ):  # bad, again, sound, not there yet, for nobody
                coordinator.report_bad_chunk(number)
            journal.wait_for(lambda _rows: journal.made()[order[0]] == 2, unless=running.done)
            story.quarantined = sorted(
                path.name for path in Path(story.store.url).rglob("quarantine/*")
            )

            journal.wait_for(
                lambda rows: any(
                    isinstance(row, TeacherEvent) and row.replica == 2 for row in rows
                ),
                unless=running.done,
            )
            for cursor in range(1, NUM_CHUNKS - WINDOW + 1):
                coordinator.move_cursor("student", cursor)
                journal.wait_for(
                    partial(has_made, journal, set(order[: cursor + WINDOW])), unless=running.done
                )
                story.published_by_cursor.append(story.store.published())
        finally:
            students_are_done.set()
            coordinator.move_cursor("student", NUM_CHUNKS)  # after a failure, too: it ends
        running.result(timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def coordinator(ray_cluster: dict[str, float]) -> Coordinator:
    assert ray_cluster["CPU"] >= 1
    return Coordinator.create()


@pytest.fixture(scope="module")
def story(
    tiny_world: TinyWorld, coordinator: Coordinator, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    plan = new_plan(tiny_world, tmp_path_factory.mktemp("pool"))
    story = Story(plan, plan.chunks[:NUM_CHUNKS], WatchedTracker())
    asked: list[int] = []

    def item_of(number: int) -> Work:
        asked.append(number)
        if len(asked) == WINDOW:
            # each has a chunk in work, and one is about to get another
            kill_one("ray::_TeacherActor")
        return plan.item(number)

    pool = pool_of(
        plan,
        coordinator,
        order=story.order,
        journal=story.journal,
        item_of=item_of,
        min_replicas=2,
        max_replicas=2,
    )
    coordinator.move_cursor("a stranger", 1000)
    live_through_it(story, pool, coordinator)
    return story


def test_work_begins_when_the_fewest_teachers_are_ready(story: Story) -> None:
    rows = [row for row in story.journal.rows if isinstance(row, ChunkEvent | TeacherEvent)]
    assert {row.replica for row in rows[:2] if isinstance(row, TeacherEvent)} == {0, 1}


def test_a_killed_teacher_is_replaced_and_every_chunk_is_made_once(story: Story) -> None:
    assert [row.replica for row in story.journal.rows if isinstance(row, TeacherEvent)][2:] == [2]
    # the first was damaged, and made anew
    assert story.journal.made() == Counter([*story.order, story.order[0]])
    story.journal.require_duplicates_of_hedged_work_alone()
    assert story.store.published() == set(story.order)
    for number in story.order:
        story.store.verify(number)


def test_behind_a_closed_window_nothing_is_made(story: Story) -> None:
    assert story.published_by_cursor == [
        set(story.order[: WINDOW + cursor]) for cursor in range(NUM_CHUNKS - WINDOW + 1)
    ]
    assert max(row.replicas for row in story.journal.rows if isinstance(row, PoolEvent)) == 2
    assert story.order != sorted(story.order)  # or the reading order would prove nothing
    row = story.row_behind_the_window
    assert row is not None
    assert (row.published, row.needed, row.in_flight, row.window_chunks, row.failures) == (
        WINDOW,
        NUM_CHUNKS,
        0,
        WINDOW,
        0,
    )


def test_a_damaged_chunk_is_quarantined_once_and_made_anew_to_the_same_bytes(story: Story) -> None:
    number = story.order[0]
    assert len(story.quarantined) == 1
    assert story.quarantined[0].startswith(f"{number:010d}-")
    assert story.path_of(number).read_bytes() == story.bytes_before[number]
    assert [row.chunk for row in story.journal.rows if isinstance(row, RepairEvent)] == [number]


def test_a_false_report_changes_nothing(story: Story) -> None:
    number = story.order[1]
    assert story.path_of(number).read_bytes() == story.bytes_before[number]
    assert story.journal.made()[number] == 1


def test_what_is_published_is_never_made_again(story: Story, coordinator: Coordinator) -> None:
    journal = WatchedTracker()
    pool = pool_of(
        story.plan, coordinator, order=story.order, journal=journal, item_of=story.plan.item
    )
    pool.run(readers=["student"], coordinator=coordinator, finished=lambda: True)
    (row,) = journal.rows
    assert isinstance(row, PoolEvent)
    assert (row.published, row.needed) == (len(story.order), len(story.order))


def test_a_student_that_failed_ends_the_run_before_the_chunks_are_made(
    story: Story, coordinator: Coordinator
) -> None:
    def finished() -> bool:
        raise StudentError("the loss is nan")

    pool = pool_of(
        story.plan,
        coordinator,
        order=story.plan.chunks,
        journal=WatchedTracker(),
        item_of=story.plan.item,
    )
    with pytest.raises(StudentError, match="the loss is nan"):
        pool.run(readers=["student"], coordinator=coordinator, finished=finished)


@dataclass
class Poisoned:
    """What is left of an attempt in which one sequence could not be computed."""

    plan: Plan
    journal: WatchedTracker
    shown: str  # on the driver's standard error

    def log_of(self, role: str) -> str:
        (path,) = (self.plan.run_dir / "logs").glob(f"{role}-*.log")
        return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def poisoned_attempt(
    tiny_world: TinyWorld, coordinator: Coordinator, tmp_path_factory: pytest.TempPathFactory
) -> Poisoned:
    plan = new_plan(tiny_world, tmp_path_factory.mktemp("poison"))
    sound, bad = plan.chunks[:2]
    journal = WatchedTracker()
    with redirect_stderr(StringIO()) as shown, attempt(plan.request, "stillhouse produce"):
        pool = pool_of(
            plan,
            replace(coordinator, log=handed_on()),
            order=[sound, bad],
            journal=journal,
            item_of=lambda number: (
                poisoned(item_with_tokens(plan, number)) if number == bad else plan.item(number)
            ),
            max_failures=1,
        )
        pool.run(readers=[], coordinator=coordinator, finished=lambda: True)
    return Poisoned(plan, journal, shown.getvalue())


def test_a_sequence_that_no_teacher_can_compute_is_set_aside_and_a_teacher_that_raised_is_replaced(
    poisoned_attempt: Poisoned,
) -> None:
    """After an error on a GPU nothing works any more in that process: it would fail chunk after
    chunk."""
    plan, journal = poisoned_attempt.plan, poisoned_attempt.journal
    sound, bad = plan.chunks[:2]
    # for the chunk and for its first sequence
    assert [row.replica for row in journal.rows if isinstance(row, TeacherEvent)] == [
        0,
        1,
        2,
    ]
    assert journal.made() == Counter([sound, bad])
    journal.require_duplicates_of_hedged_work_alone()
    (row,) = [row for row in journal.rows if isinstance(row, SetAsideEvent)]
    assert (row.chunk, row.sequences) == (bad, [plan.recipe.chunk_rows(bad)[0]])
    assert row.reason.startswith("IndexError: index out of range")
    made_chunk = ChunkStore(plan.config.store.url, plan.recipe).fetch(bad)
    item = item_with_tokens(plan, bad)
    assert not made_chunk.sequences.loss_mask_SL[0].any()
    assert np.array_equal(made_chunk.sequences.loss_mask_SL[1:], item.sequences.loss_mask_SL[1:])
    assert np.array_equal(made_chunk.sequences.token_ids_SL[1:], item.sequences.token_ids_SL[1:])


def test_what_a_teacher_met_is_in_its_log_with_its_traceback_and_at_the_driver_in_a_line(
    poisoned_attempt: Poisoned,
) -> None:
    bad = poisoned_attempt.plan.chunks[1]
    words = f"stillhouse.teacher.actor: chunk {bad}: IndexError: index out of range"
    assert words in poisoned_attempt.log_of("teacher-0")
    assert "Traceback (most recent call last):" in poisoned_attempt.log_of("teacher-0")
    assert "Traceback" not in poisoned_attempt.log_of("teacher-2")
    (line,) = [line for line in poisoned_attempt.shown.splitlines() if words in line]
    assert " ERROR teacher-0-" in line
    assert "Traceback" not in poisoned_attempt.shown


def test_a_model_that_is_not_there_is_said_as_it_is(
    tiny_world: TinyWorld, coordinator: Coordinator, tmp_path: Path
) -> None:
    plan = new_plan(tiny_world, tmp_path)
    pool = pool_of(
        plan,
        coordinator,
        order=plan.chunks,
        journal=WatchedTracker(),
        item_of=plan.item,
        model=str(tmp_path / "nowhere"),
    )
    with pytest.raises(ModelError, match="nowhere"):
        pool.run(readers=[], coordinator=coordinator, finished=lambda: True)


def test_weights_that_the_cache_told_wrong_end_the_run_and_the_same_command_plans_anew(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    world = replace(tiny_world, folder=tmp_path)  # with a cache of its own

    def planned() -> Plan:
        return world.plan(tmp_path / "run", store={"url": str(tmp_path / "store")})

    before = planned()
    weights = Path(world.config().teacher.model) / "model.safetensors"
    for note in (tmp_path / "cache" / "weights").iterdir():
        if note.read_text() == sha256(weights.read_bytes()).hexdigest():
            # as if other weights had come that look the same from outside
            note.write_text("0" * 64)
    plan = planned()
    assert plan.recipe.teacher_digest != before.recipe.teacher_digest
    with pytest.raises(
        ChangedWeightsError,
        match=f"found {before.recipe.teacher_digest[:16]}, wanted "
        f"{plan.recipe.teacher_digest[:16]}",
    ):
        pipeline.produce(plan)
    assert ChunkStore(plan.config.store.url, plan.recipe).published() == set()
    assert planned().recipe == before.recipe


def test_a_teacher_that_differs_from_the_one_that_filled_the_store_ends_the_run_at_once(
    tiny_world: TinyWorld, coordinator: Coordinator, tmp_path: Path
) -> None:
    """As another engine with a fault would: all else about it is as planned."""
    plan = new_plan(tiny_world, tmp_path)
    store = ChunkStore.create(plan.config.store.url, plan.recipe)
    section = plan.config.teacher.model_copy(update={"model": plan.config.student.model})
    require_first_teacher(store, TransformersEngine(section, plan.recipe, device="cpu").probe())
    pool = pool_of(
        plan, coordinator, order=plan.chunks, journal=WatchedTracker(), item_of=plan.item
    )
    with pytest.raises(RecipeError, match="filled this store first"):
        pool.run(readers=[], coordinator=coordinator, finished=lambda: True)
    assert store.published() == set()


def test_a_store_that_cannot_be_written_ends_the_run_at_once(
    tiny_world: TinyWorld, coordinator: Coordinator, tmp_path: Path
) -> None:
    plan = new_plan(tiny_world, tmp_path)
    asked: list[int] = []

    def item_of(number: int) -> Work:
        asked.append(number)
        return plan.item(number)

    pool = pool_of(plan, coordinator, order=plan.chunks, journal=WatchedTracker(), item_of=item_of)
    store = ChunkStore(plan.config.store.url, plan.recipe)
    (Path(store.url) / store.key(0)).parents[1].write_text("where the chunks should go")
    with pytest.raises(StoreError, match="cannot write"):
        pool.run(readers=[], coordinator=coordinator, finished=lambda: True)
    assert asked == plan.chunks[:2]  # what one teacher is given, and no second try
