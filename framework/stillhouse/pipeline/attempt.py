"""An attempt: one command's use of a run directory, from the lock to the `end` row of its
journal."""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from time import monotonic, time
from typing import Literal

from stillhouse.checkpoint.manifest import newest_manifest, require_same_training
from stillhouse.config import Config
from stillhouse.errors import InterruptedRunError, RunError, StoreError
from stillhouse.pipeline.console import patient, say
from stillhouse.pipeline.holder import Holder
from stillhouse.pipeline.ownership import Owner, locked, owned
from stillhouse.pipeline.plan import Plan, require_full_step
from stillhouse.pipeline.run_dir import claim, leave_former_place, require_same_run
from stillhouse.pipeline.run_store import store_to_fill
from stillhouse.store import ChunkStore
from stillhouse.store.object_store import Blobs
from stillhouse.store.probe import require_create_only
from stillhouse.student.job import TrainJob
from stillhouse.tracking import (
    EndRow,
    Journal,
    JournalReader,
    ProgressView,
    StartRow,
    TrainRow,
    WandbView,
    nothing_left,
)
from stillhouse.tracking.log import driver_log

_FOLLOW_EVERY_S = 0.5
_VERSIONED = ("stillhouse", "torch", "deepspeed", "ray", "transformers", "datasets", "wandb")


@contextmanager
def attempt(plan: Plan, command: str) -> Iterator[Journal]:
    """Use the run directory without training: lock it, write down what is asked, journal start and
    end, and show the journal.

    Raises RecipeError where the directory belongs to another run, and ConfigError where another
    command is using it; a command that is refused leaves config.json, recipe.json and the journal
    as they are. The journal does not wait for room, as `patient` makes it do.
    """
    with locked(plan.run_dir, Holder.here(command, plan.run_dir, now=time())):
        require_same_run(plan.run_dir, config=plan.config, recipe=plan.recipe)
        with _journalled(
            plan, command, store=store_to_fill(plan.store, plan.chunks), committed={}
        ) as journal:
            yield journal


@contextmanager
def learning_attempt(
    plan: Plan,
    command: str,
    *,
    open_store: Callable[[ChunkStore, Collection[int]], ChunkStore] = store_to_fill,
) -> Iterator[tuple[Journal, Owner]]:
    """The same, for a command that trains: it also owns the place of the checkpoints, which another
    run directory may name as well.

    `open_store` raises what keeps the command from beginning with this store.
    """
    require_full_step(
        plan.config.student.global_batch_sequences, there=plan.sources.train.num_sequences
    )
    holder, place = Holder.here(command, plan.run_dir, now=time()), plan.jobs()[0].place
    with locked(plan.run_dir, holder):
        require_same_run(plan.run_dir, config=plan.config, recipe=plan.recipe)
        require_create_only(Blobs(place))
        with owned(place, holder, say=say) as owner:
            store = open_store(plan.store, plan.chunks)
            committed: dict[str, int] = {job.role: _committed_step(job) for job in plan.jobs()}
            with _journalled(plan, command, store=store, committed=committed) as journal:
                yield journal, owner


def _committed_step(job: TrainJob) -> int:
    """The steps in its newest commit. Raises CheckpointError where that is of another training."""
    newest = newest_manifest(job.checkpoints)
    if newest is None:
        return 0
    require_same_training(job.checkpoints, newest, job.origin)
    return newest.step


@contextmanager
def visit(run_dir: Path, command: str) -> Iterator[Journal]:
    """Use the run directory for what is no attempt: lock it, and show what is journalled meanwhile,
    without a start and an end."""
    with locked(run_dir, Holder.here(command, run_dir, now=time())), driver_log(run_dir):
        journal = Journal(run_dir / "journal.jsonl")
        reader = JournalReader(journal.path)
        reader.new_rows()
        with _shown(reader, [ProgressView()]):
            yield journal


@contextmanager
def _journalled(
    plan: Plan, command: str, *, store: ChunkStore, committed: Mapping[str, int]
) -> Iterator[Journal]:
    """Write down what is asked, then what happens. `committed`: of each role that is trained, the
    steps in its newest commit."""
    # what is asked, once nothing refuses it any more
    began = monotonic()
    before = claim(plan.run_dir, config=plan.config, recipe=plan.recipe)
    if before is not None:
        leave_former_place(plan.run_dir, store, before=before.student, now=plan.config.student)

    # the start row, and what it leads to
    journal = Journal(plan.run_dir / "journal.jsonl")
    reader = JournalReader(journal.path)
    earlier = reader.new_rows()
    start = _start_row(
        plan, command, sum(isinstance(row, StartRow) for row in earlier) + 1, committed
    )
    with driver_log(plan.run_dir, attempt=start.attempt):
        patient(journal).record(start)
        idle = nothing_left(earlier, start)
        if idle:
            say(idle)

        # what happens, and how it ends
        ending = _Ending(journal, reader, began, committed, idle)
        with ending.journalled():
            views = _views(plan.config, plan.run_dir)
        with _shown(JournalReader(journal.path), views), ending.journalled("done"):
            yield journal


class _Ending:
    """Writes the `end` row of an attempt."""

    def __init__(
        self,
        journal: Journal,
        reader: JournalReader,
        began: float,
        committed: Mapping[str, int],
        idle: str,
    ) -> None:
        """`reader` is behind the start row; `idle` is what is said where the attempt takes no step
        because none is left."""
        self._journal, self._reader, self._began, self._committed, self._idle = (
            journal,
            reader,
            began,
            committed,
            idle,
        )

    @contextmanager
    def journalled(self, outcome: Literal["done"] | None = None) -> Iterator[None]:
        """Journal how the block ended: with `outcome` where it went well and one is given, always
        where it raised."""
        try:
            yield
        except KeyboardInterrupt:
            self._record("interrupted", "Ctrl-C; the same command goes on from here")
            raise
        except InterruptedRunError as error:
            self._record("interrupted", str(error))
            raise
        except BaseException as error:
            self._record("failed", str(error))
            raise
        if outcome is not None:
            self._record(outcome)

    def _record(self, outcome: Literal["done", "interrupted", "failed"], message: str = "") -> None:
        try:
            steps = [row for row in self._reader.new_rows() if isinstance(row, TrainRow)]
        except RunError:
            steps = []  # a damaged journal must not hide what ended the attempt
        taken = dict(Counter[str](row.role for row in steps))
        done = dict(self._committed) | {row.role: row.step for row in steps}
        seconds = monotonic() - self._began
        if outcome == "done":
            patient(self._journal).record(
                EndRow(outcome, seconds, "" if taken else self._idle, taken, done)
            )
            return
        with suppress(
            StoreError
        ):  # a full disk neither hides what ended the attempt, nor keeps it waiting
            self._journal.record(EndRow(outcome, seconds, message, taken, done))


def _views(config: Config, run_dir: Path) -> list[ProgressView | WandbView]:
    section = config.tracking
    if section.wandb == "off":
        return [ProgressView()]
    first = next(
        row
        for row in JournalReader(run_dir / "journal.jsonl").new_rows()
        if isinstance(row, StartRow)
    )
    return [
        ProgressView(),
        WandbView(
            section,
            run_dir,
            config=config.model_dump(mode="json"),
            run_id=section.run_id or _run_id(first),
        ),
    ]


def _run_id(first: StartRow) -> str:
    """The W&B id of a run that was given none: the same for as long as its journal keeps its first
    row."""
    return f"{first.recipe_fingerprint[:8]}-{round(first.time * 1000):x}"


def _start_row(plan: Plan, command: str, number: int, committed: Mapping[str, int]) -> StartRow:
    config, corpus, student = plan.config, plan.sources.train, plan.config.student
    return StartRow(
        attempt=number,
        command=command,
        versions={name: version(name) for name in _VERSIONED},
        teacher=config.teacher.model,
        student=student.model,
        recipe_fingerprint=plan.recipe.fingerprint,
        num_chunks=len(plan.chunks),
        num_sequences=corpus.num_sequences,
        sequence_length=corpus.sequence_length,
        num_targets=corpus.num_targets,
        bytes_per_token=plan.recipe.spec.bytes_per_token,
        num_draws=plan.recipe.num_draws,
        vocab_size=plan.recipe.vocab_size,
        k=plan.recipe.k,
        world_size=student.num_workers,
        zero_stage=student.zero_stage,
        num_teachers=config.teacher.max_replicas,
        total_steps=plan.total_steps,
        control=config.evaluate.control,
        learning_rate=student.learning_rate,
        min_learning_rate=student.min_learning_rate,
        warmup_steps=student.warmup_steps,
        epochs=student.epochs,
        max_steps=student.max_steps,
        committed_steps=dict(committed),
    )


@contextmanager
def _shown(reader: JournalReader, views: Sequence[ProgressView | WandbView]) -> Iterator[None]:
    """Feed new journal rows to the views from a thread: whatever writes the journal, on whichever
    machine, is seen."""
    stopped = threading.Event()

    def feed() -> None:
        while True:
            last = stopped.wait(_FOLLOW_EVERY_S)
            for row in reader.new_rows():
                for view in views:
                    view.record(row)
            if last:
                return

    thread = threading.Thread(target=feed, name="journal-views", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        for view in views:
            view.close()
