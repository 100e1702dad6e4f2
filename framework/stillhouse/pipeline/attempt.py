"""An attempt: one command's use of a run directory, from the lock to the `end` event of its
journal."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import monotonic, time
from typing import Literal

from stillhouse.checkpoint.choice import newest_manifest
from stillhouse.checkpoint.manifest import require_same_training
from stillhouse.config import Config
from stillhouse.errors import InterruptedRunError, RunError, StoreError
from stillhouse.pipeline.console import patient, say
from stillhouse.pipeline.holder import Holder
from stillhouse.pipeline.ownership import Owner, locked, owned
from stillhouse.pipeline.plan import Request, require_full_step
from stillhouse.pipeline.run_dir import (
    claim,
    keep_account,
    leave_former_place,
    require_same_run,
)
from stillhouse.pipeline.run_store import store_to_fill
from stillhouse.store import ChunkStore
from stillhouse.store.object_store import Blobs
from stillhouse.store.probe import require_create_only
from stillhouse.student.job import TrainJob
from stillhouse.tracking import (
    EndEvent,
    Journal,
    JournalReader,
    ProgressView,
    StartEvent,
    TrainEvent,
    WandbView,
    nothing_left,
)
from stillhouse.tracking.follow import followed
from stillhouse.tracking.log import driver_log

OpenStore = Callable[[ChunkStore, Collection[int]], ChunkStore]
Outcome = Literal["done", "interrupted", "failed"]

_FOLLOW_EVERY_S = 0.5
_VERSIONED = ("stillhouse", "torch", "deepspeed", "ray", "transformers", "datasets", "wandb")


@contextmanager
def attempt(request: Request, command: str) -> Iterator[Journal]:
    """Use the run directory without training: lock it, write down what is asked, journal start and
    end, and show the journal.

    Raises RecipeError where the directory belongs to another run, and ConfigError where another
    command is using it; a command that is refused leaves config.json, recipe.json and the journal
    as they are. The journal does not wait for room, as `patient` makes it do.
    """
    with _locked(request, command):
        store = store_to_fill(request.store, request.chunks)
        with _journalled(request, command, store=store, committed={}) as journal:
            yield journal


@contextmanager
def learning_attempt(
    request: Request,
    command: str,
    *,
    jobs: Sequence[TrainJob],
    open_store: OpenStore = store_to_fill,
) -> Iterator[tuple[Journal, Owner]]:
    """As `attempt`, for a command that trains these jobs: it also owns the place of the
    checkpoints, which another run directory may name as well.

    `open_store` raises what keeps the command from beginning with this store.
    """
    batch, place = jobs[0].section.global_batch_sequences, jobs[0].checkpoints_root
    require_full_step(batch, there=request.recipe.num_sequences)
    with _locked(request, command) as holder:
        require_create_only(Blobs(place))
        with owned(place, holder, say=say) as owner:
            store = open_store(request.store, request.chunks)
            committed: dict[str, int] = {job.role: _committed_step(job) for job in jobs}
            with _journalled(request, command, store=store, committed=committed) as journal:
                yield journal, owner


@contextmanager
def visit(run_dir: Path, command: str) -> Iterator[Journal]:
    """Use the run directory for what is no attempt: lock it, and show what is journalled meanwhile,
    without a start and an end."""
    with locked(Holder.here(command, run_dir, now=time())), driver_log(run_dir):
        journal = Journal(run_dir / "journal.jsonl")
        reader = JournalReader(journal.path)
        reader.new_events()
        with shown(reader, ProgressView()):
            yield journal


@contextmanager
def _locked(request: Request, command: str) -> Iterator[Holder]:
    """Hold the run directory, which must be this run's or new."""
    holder = Holder.here(command, request.run_dir, now=time())
    with locked(holder):
        require_same_run(request.run_dir, config=request.config, recipe=request.recipe)
        yield holder


def _committed_step(job: TrainJob) -> int:
    """The steps in the job's newest commit. Raises CheckpointError where that is of another
    training."""
    newest = newest_manifest(job.checkpoints)
    if newest is None:
        return 0
    require_same_training(job.checkpoints, newest, job.origin)
    return newest.step


@contextmanager
def _journalled(
    request: Request, command: str, *, store: ChunkStore, committed: Mapping[str, int]
) -> Iterator[Journal]:
    """Write down what is asked, then what happens. `committed`: the steps in the newest commit of
    each role that is trained."""
    run_dir, config = request.run_dir, request.config

    # what is asked, now that nothing refuses it
    began = monotonic()
    before = claim(run_dir, config=config, recipe=request.recipe)
    if before is not None:
        leave_former_place(run_dir, store, before=before.student, now=config.student)

    # the start event, and what it leads to
    journal = Journal(run_dir / "journal.jsonl")
    waiting, reader = patient(journal), JournalReader(journal.path)
    earlier = reader.new_events()
    start = replace(
        request.start,
        attempt=sum(isinstance(event, StartEvent) for event in earlier) + 1,
        command=command,
        versions={name: version(name) for name in _VERSIONED},
        committed_steps=dict(committed),
    )
    with driver_log(run_dir, attempt=start.attempt):
        keep_account(run_dir, request.parts)
        waiting.record(start)
        idle = nothing_left(earlier, start)
        if idle:
            say(idle)

        # the end event, whether views, the command or the machine fail
        def end(outcome: Outcome, message: str = "") -> None:
            taken, done = _steps(reader, committed)
            seconds = monotonic() - began
            if outcome == "done":
                waiting.record(EndEvent(outcome, seconds, "" if taken else idle, taken, done))
                return
            with suppress(StoreError):  # a full disk neither hides nor delays another outcome
                journal.record(EndEvent(outcome, seconds, message, taken, done))

        with failure_journalled(end):
            wandb = _wandb_view(config, run_dir)
        others = [] if wandb is None else [wandb]
        with shown(JournalReader(journal.path), ProgressView(), *others):
            with failure_journalled(end):
                yield journal
            end("done")


@contextmanager
def failure_journalled(end: Callable[[Outcome, str], None]) -> Iterator[None]:
    """Give `end` the outcome of a block that raises, and its reason."""
    try:
        yield
    except KeyboardInterrupt:
        end("interrupted", "Ctrl-C; the same command goes on from here")
        raise
    except InterruptedRunError as error:
        end("interrupted", str(error))
        raise
    except BaseException as error:
        end("failed", str(error))
        raise


def _steps(
    reader: JournalReader, committed: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """By role: the steps that this attempt took, and the number of its last one. `reader` is behind
    the start event."""
    try:
        steps = [event for event in reader.new_events() if isinstance(event, TrainEvent)]
    except RunError:
        steps = []  # a damaged journal must not hide what ended the attempt
    done = dict(committed) | {event.role: event.step for event in steps}
    return dict(Counter[str](event.role for event in steps)), done


def _wandb_view(config: Config, run_dir: Path) -> WandbView | None:
    section = config.tracking
    if section.wandb == "off":
        return None
    events = JournalReader(run_dir / "journal.jsonl").new_events()
    first = next(event for event in events if isinstance(event, StartEvent))
    # a run that was given no id has the same one for as long as its journal keeps its first event
    own_id = f"{first.recipe_fingerprint[:8]}-{round(first.time * 1000):x}"
    settings = config.model_dump(mode="json")
    return WandbView(section, run_dir, config=settings, run_id=section.run_id or own_id)


@contextmanager
def shown(reader: JournalReader, progress: ProgressView, *others: WandbView) -> Iterator[None]:
    """Show the views new events of the journal, whichever process on whichever machine writes
    it."""
    views: list[ProgressView | WandbView] = [progress, *others]

    def look() -> None:
        for event in reader.new_events():
            for view in views:
                view.record(event)
        progress.tick()

    try:
        with followed(look, every_s=_FOLLOW_EVERY_S, name="journal-views"):
            yield
    finally:
        for view in views:
            view.close()
