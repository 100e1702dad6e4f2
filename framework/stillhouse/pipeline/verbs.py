"""The verbs of a run as functions of its plan. Each reads what is on disk, so each can be stopped anywhere and done again.

`command` is what the user typed, for the journal.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import time
from typing import Literal

from stillhouse.checkpoint.manifest import newest_step
from stillhouse.cluster.coordinator import Board
from stillhouse.cluster.nodes import await_room
from stillhouse.cluster.placement import Crews, placement, student_crew, teacher_crew
from stillhouse.cluster.processes import call_remotely, local_secrets
from stillhouse.cluster.session import attached
from stillhouse.config import ModelSection
from stillhouse.errors import ChangedWeightsError, CheckpointError, StoreError
from stillhouse.evaluation.scores import EvaluationJob, ModelName, Scores, Trained, evaluate, outage_teller
from stillhouse.models import forget_identity
from stillhouse.pipeline.attempt import attempt, learning_attempt, patient, require_chunks, say, shown, store_to_read, tell_of_wait
from stillhouse.pipeline.card import model_card
from stillhouse.pipeline.holder import Holder
from stillhouse.pipeline.machines import watched_machines
from stillhouse.pipeline.ownership import locked
from stillhouse.pipeline.plan import Plan, resolved
from stillhouse.pipeline.run_dir import config_of
from stillhouse.pipeline.shared_dirs import require_shared
from stillhouse.report import write_report
from stillhouse.retry import DEFAULT_PATIENCE, insist
from stillhouse.sequences.source import whole
from stillhouse.store import ChunkStore, Reader, StoreForbidden
from stillhouse.store.consumers import join, leave, reader_name
from stillhouse.student.job import order_of_reader, where_it_goes_on
from stillhouse.student.loader import chunks_read_ahead
from stillhouse.student.workers import fit
from stillhouse.teacher.actor import TeacherJob
from stillhouse.teacher.crew import RayCrew
from stillhouse.teacher.pool import TeacherPool
from stillhouse.teacher.readership import Readership
from stillhouse.tracking import ROOM_PATIENCE, EvalRow, Journal, JournalReader, ProgressView, Tracker, WaitRow
from stillhouse.tracking.log import driver_log, terminal_log

_LOOK_EVERY_S = 1.0


def produce(made: Plan, *, command: str = "stillhouse produce") -> None:
    """Fill the store with every chunk that training will read."""
    _require_shared_store(made)
    with attempt(made, command) as journal, attached(made.config.cluster):
        board = Board.create(journal.path)
        with watched_machines(board, journal, grace_s=made.config.cluster.grace_s) as machines:
            rows = patient(journal, pause=machines.pause)
            available = _room(made, teacher_crew(made.config.teacher), rows, unless=machines.require_driver)
            _require_shared_places(made, available, at_store=[made.config.teacher], learning=False)

            def finished() -> bool:
                machines.require_driver()
                return True

            _teach(made, rows, available=available, board=board, readers=(), finished=finished)


def repair(made: Plan, numbers: Sequence[int], *, journal: Tracker) -> None:
    """Have teachers make exactly these chunks, which are out of the store already; neither a run directory nor a student has a part."""
    _require_shared_store(made)
    with terminal_log(), attached(made.config.cluster):
        available = _room(made, teacher_crew(made.config.teacher), journal, unless=lambda: None)
        _require_shared_places(made, available, at_store=[made.config.teacher], learning=False)
        _teach(made, journal, available=available, board=Board.create(), readers=(), finished=lambda: True, order=numbers)


def train(made: Plan, *, command: str = "stillhouse train") -> None:
    """Train on a store that already holds what is needed, then evaluate and report. Raises StoreError where chunks are missing."""
    ready = learning_attempt(made, command, open_store=store_to_read)
    with ready as (journal, owner), attached(made.config.cluster):
        board = Board.create(journal.path)
        with watched_machines(board, journal, grace_s=made.config.cluster.grace_s) as machines:
            rows = patient(journal, pause=machines.pause)
            available = _room(made, student_crew(made.config.student), rows, unless=machines.require_driver)
            _require_shared_places(made, available, at_store=[made.config.student], learning=True, filling=False)
            _register(made)
            students = _Background(lambda: _learn(made, rows, owner.number, available=available, board=board, teachers_at_work=False))
            students.join(unless=lambda: owner.is_lost() or machines.nobody_commits())
            owner.require()
            machines.require_driver()
        _evaluate(made, patient(journal), available=available, board=board)
    _report(made.run_dir)


def _register(made: Plan) -> None:
    """Register the students, so that nobody deletes their chunks, and say so where they cannot be registered.

    Raises StoreError where somebody has just deleted some.
    """
    store = ChunkStore(made.config.store.url, made.recipe)
    try:
        _join_readers(made, store)
    except StoreForbidden:
        say(
            f"{store.url} may only be read, so this training cannot be registered there: a run elsewhere with"
            ' store.retain = "until-read" may delete chunks that are still to be read here, which would end this command;'
            " what is committed stays"
        )
    require_chunks(made, store)


def run(made: Plan, *, command: str = "stillhouse run") -> None:
    """Produce and train at the same time, then evaluate and report. On an existing run directory it goes on where it stopped."""
    _require_shared_store(made)
    with learning_attempt(made, command) as (journal, owner), attached(made.config.cluster):
        board = Board.create(journal.path)
        with watched_machines(board, journal, grace_s=made.config.cluster.grace_s) as machines:
            rows = patient(journal, pause=machines.pause)
            everyone = teacher_crew(made.config.teacher) | student_crew(made.config.student)
            available = _room(made, everyone, rows, unless=machines.require_driver)
            _require_shared_places(made, available, at_store=[made.config.teacher, made.config.student], learning=True)
            students = _Background(lambda: _learn(made, rows, owner.number, available=available, board=board, teachers_at_work=True))

            def finished() -> bool:
                owner.require()
                done = students.finished() or machines.nobody_commits()
                if done:
                    machines.require_driver()
                return done

            _teach(made, rows, available=available, board=board, readers=("student",), finished=finished)
        _evaluate(made, patient(journal), available=available, board=board)
    _report(made.run_dir)


def evaluate_run(made: Plan, *, command: str = "stillhouse eval") -> dict[ModelName, Scores]:
    """Score teacher, student and control on the held-out split, and journal the scores."""
    holder = Holder.here(command, made.run_dir, now=time())
    with locked(made.run_dir, holder), driver_log(made.run_dir), attached(made.config.cluster) as available:
        journal = Journal(made.run_dir / "journal.jsonl")
        earlier = JournalReader(journal.path)
        earlier.new_rows()
        with shown(earlier, [ProgressView()]):
            return _evaluate(made, patient(journal), available=available, board=Board.create(journal.path))


def open_run(run_dir: Path, *, cache_dir: Path) -> Plan:
    """The plan of a run directory that exists already. Raises RecipeError where it is none."""
    return resolved(config_of(run_dir), run_dir=run_dir, cache_dir=cache_dir)


def export_run(made: Plan, out: Path, *, role: Literal["student", "control"] = "student") -> int:
    """Write a trained model as a plain Hugging Face directory; returns the optimiser steps behind it."""
    from stillhouse.student.export import export  # DeepSpeed, which only this needs here, takes seconds to import

    job = next((job for job in made.jobs() if job.role == role), None)
    if job is None:
        raise CheckpointError(f"this run has no {role}: evaluate.control is false in its config")
    return export(
        job.checkpoints,
        out,
        section=job.section,
        tokenizer=made.tokenizer,
        card=lambda steps: model_card(made, role, steps),
        tell=lambda seconds, why: say(f"the export has waited for {seconds:.0f} s: {why}"),
    )


def _room(made: Plan, crews: Crews, journal: Tracker, *, unless: Callable[[], None]) -> dict[str, float]:
    """The cluster's resources, once they suffice. `unless` raises where they are not waited for any more."""
    told = ""

    def waiting(missing: str) -> None:
        nonlocal told
        unless()
        if missing != told:
            journal.record(WaitRow(missing))
            told = missing

    available = await_room(crews, made.config.cluster, waiting=waiting)
    if told:
        journal.record(WaitRow(""))
    return available


def _require_shared_places(
    made: Plan, available: Mapping[str, float], *, at_store: Sequence[ModelSection], learning: bool, filling: bool = True
) -> None:
    """Of the machines of these crews the store, and of all machines the checkpoints: the student is scored where a teacher fits."""
    store = ChunkStore(made.config.store.url, made.recipe)
    crews = [placement(each, available) for each in at_store]
    require_shared(store.url, crews, what="chunks", setting="store.url", published="" if filling else store.recipe_key)
    if learning:
        everyone = [placement(each, available) for each in (made.config.teacher, made.config.student)]
        require_shared(made.jobs()[0].checkpoints, everyone, what="checkpoints", setting="student.checkpoint_url")


def _require_shared_store(made: Plan) -> None:
    if made.config.store.url.startswith("memory:"):
        raise StoreError("a memory:// store cannot be shared between processes; give store.url a directory or a bucket")


def _teach(
    made: Plan,
    journal: Tracker,
    *,
    available: Mapping[str, float],
    board: Board,
    readers: Collection[str],
    finished: Callable[[], bool],
    order: Sequence[int] | None = None,
) -> None:
    config = made.config
    crew = RayCrew(
        TeacherJob(config.teacher, made.recipe, config.store.url, config.cluster.threads, config.cluster.notices),
        where=placement(config.teacher, available),
        secrets=local_secrets(),
        board=board,
    )
    store = ChunkStore(config.store.url, made.recipe)
    own = _join_readers(made, store)
    pool = TeacherPool(
        crew,
        config.teacher,
        store=store,
        order=made.chunks if order is None else order,
        item_of=made.item,
        window_chunks=made.window_chunks,
        journal=journal,
        readership=_readership(made, store, own) if readers else None,
    )
    try:
        pool.run(readers=readers, board=board, finished=finished)
    except ChangedWeightsError:
        forget_identity(config.teacher, cache_dir=made.cache_dir)
        raise


def _readership(made: Plan, store: ChunkStore, own: Collection[str]) -> Readership:
    """The readers of the run's store, its own students among them."""

    def position(reader: Reader) -> int | None:
        same_order = (reader.seed, reader.window_chunks) == (made.order.seed, made.order.window_chunks)
        return order_of_reader(reader, made.recipe).chunks_finished(reader.committed_step) if same_order else None

    return Readership(
        store,
        own=own,
        deletes=made.config.store.retain == "until-read",
        least_ahead=chunks_read_ahead(made.order),
        done_after=lambda reader: order_of_reader(reader, made.recipe).steps_until_done_with(reader.total_steps),
        position=position,
    )


def _join_readers(made: Plan, store: ChunkStore) -> list[str]:
    """Register the run's students, and those alone, before anybody counts on what is there; returns their names."""
    own = [job.reader(0) for job in made.jobs()]
    for reader in own:
        join(store, reader)
    names = [reader.name for reader in own]
    for role in ("student", "control"):
        if (name := reader_name(where_it_goes_on(made.config.student, made.run_dir), role)) not in names:
            leave(store, name)  # of an earlier attempt with another config: it would keep every chunk for ever
    return names


def _learn(made: Plan, journal: Tracker, owner: int, *, available: Mapping[str, float], board: Board, teachers_at_work: bool) -> None:
    fit(
        [replace(job, owner=owner) for job in made.jobs()],
        where=placement(made.config.student, available),
        threads=made.config.cluster.threads,
        secrets=local_secrets(),
        notices=made.config.cluster.notices,
        board=board,
        teachers_at_work=teachers_at_work,
        journal=journal,
    )


def _evaluate(made: Plan, journal: Tracker, *, available: Mapping[str, float], board: Board) -> dict[ModelName, Scores]:
    config = made.config
    where = placement(config.teacher, available)
    models: dict[ModelName, Trained] = {job.role: Trained(job.section, job.checkpoints, board) for job in made.jobs()}
    steps: dict[ModelName, int] = {"teacher": 0}
    ask = partial(insist, patience=DEFAULT_PATIENCE, tell=outage_teller(journal))
    steps.update({job.role: newest_step(job.checkpoints, ask=ask) for job in made.jobs()})
    comparison = EvaluationJob(
        teacher=config.teacher,
        models=models,
        vocab_size=made.recipe.vocab_size,
        section=config.evaluate,
        device=where.device,
        threads=config.cluster.threads,
        secrets=local_secrets(),
        log=board.log,
    )
    scores: dict[ModelName, Scores] = call_remotely(evaluate, comparison, whole(made.sources.heldout), where=where)
    for name, found in scores.items():
        own = name == "teacher"
        journal.record(
            EvalRow(
                model=name,
                step=steps[name],
                num_tokens=found.num_tokens,
                cross_entropy=found.cross_entropy,
                kl=None if own else found.kl,
                agreement=None if own else found.agreement,
                calibration_error=found.calibration_error,
                acceptance=None if own else found.acceptance,
            )
        )
    return scores


def _report(run_dir: Path) -> None:
    """Write the report, once there is room for it."""
    insist(lambda: write_report(run_dir), patience=ROOM_PATIENCE, tell=tell_of_wait)


class _Background:
    """A call in a thread of its own: Ray Train's `fit` would take the main thread's Ctrl-C away."""

    def __init__(self, call: Callable[[], None]):
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="students", daemon=True)
        self._thread.start()

    def join(self, *, unless: Callable[[], bool]) -> None:
        """Wait until the call has returned, unless it is given up. Raises what it raised."""
        while not (self.finished() or unless()):
            self._thread.join(_LOOK_EVERY_S)  # a wait without end would not hear a Ctrl-C on every system

    def finished(self) -> bool:
        """Whether the call has returned. Raises what it raised."""
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._error = error
