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
from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.nodes import await_room
from stillhouse.cluster.placement import ResourceNeeds, placement, student_needs, teacher_needs
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
from stillhouse.store import ChunkStore, Consumer, StoreForbidden
from stillhouse.store.consumers import consumer_name, join, leave
from stillhouse.student.job import order_of, resume_location
from stillhouse.student.loader import chunks_read_ahead
from stillhouse.student.workers import fit
from stillhouse.teacher.actor import TeacherJob
from stillhouse.teacher.crew import RayCrew
from stillhouse.teacher.pool import TeacherPool
from stillhouse.teacher.retention import Retention
from stillhouse.tracking import ROOM_PATIENCE, EvalRow, Journal, JournalReader, ProgressView, Tracker, WaitRow
from stillhouse.tracking.log import driver_log, terminal_log

_LOOK_EVERY_S = 1.0


def produce(plan: Plan, *, command: str = "stillhouse produce") -> None:
    """Fill the store with every chunk that training will read."""
    _require_shared_store(plan)
    with attempt(plan, command) as journal, attached(plan.config.cluster):
        coordinator = Coordinator.create(journal.path)
        with watched_machines(coordinator, journal, grace_s=plan.config.cluster.grace_s) as machines:
            rows = patient(journal, pause=machines.pause)
            available = _room(plan, teacher_needs(plan.config.teacher), rows, unless=machines.require_driver)
            _require_shared_places(plan, available, at_store=[plan.config.teacher], learning=False)

            def finished() -> bool:
                machines.require_driver()
                return True

            _teach(plan, rows, available=available, coordinator=coordinator, readers=(), finished=finished)


def repair(plan: Plan, numbers: Sequence[int], *, journal: Tracker) -> None:
    """Have teachers make exactly these chunks, which are out of the store already; neither a run directory nor a student has a part."""
    _require_shared_store(plan)
    with terminal_log(), attached(plan.config.cluster):
        available = _room(plan, teacher_needs(plan.config.teacher), journal, unless=lambda: None)
        _require_shared_places(plan, available, at_store=[plan.config.teacher], learning=False)
        _teach(plan, journal, available=available, coordinator=Coordinator.create(), readers=(), finished=lambda: True, order=numbers)


def train(plan: Plan, *, command: str = "stillhouse train") -> None:
    """Train on a store that already holds what is needed, then evaluate and report. Raises StoreError where chunks are missing."""
    ready = learning_attempt(plan, command, open_store=store_to_read)
    with ready as (journal, owner), attached(plan.config.cluster):
        coordinator = Coordinator.create(journal.path)
        with watched_machines(coordinator, journal, grace_s=plan.config.cluster.grace_s) as machines:
            rows = patient(journal, pause=machines.pause)
            available = _room(plan, student_needs(plan.config.student), rows, unless=machines.require_driver)
            _require_shared_places(plan, available, at_store=[plan.config.student], learning=True, filling=False)
            _register(plan)
            students = _Background(
                lambda: _learn(plan, rows, owner.number, available=available, coordinator=coordinator, teachers_at_work=False)
            )
            students.join(unless=lambda: owner.is_lost() or machines.nobody_commits())
            owner.require()
            machines.require_driver()
        _evaluate(plan, patient(journal), available=available, coordinator=coordinator)
    _report(plan.run_dir)


def _register(plan: Plan) -> None:
    """Register the students, so that nobody deletes their chunks, and say so where they cannot be registered.

    Raises StoreError where somebody has just deleted some.
    """
    store = ChunkStore(plan.config.store.url, plan.recipe)
    try:
        _join_readers(plan, store)
    except StoreForbidden:
        say(
            f"{store.url} may only be read, so this training cannot be registered there: a run elsewhere with"
            ' store.retain = "until-read" may delete chunks that are still to be read here, which would end this command;'
            " what is committed stays"
        )
    require_chunks(plan, store)


def run(plan: Plan, *, command: str = "stillhouse run") -> None:
    """Produce and train at the same time, then evaluate and report. On an existing run directory it goes on where it stopped."""
    _require_shared_store(plan)
    with learning_attempt(plan, command) as (journal, owner), attached(plan.config.cluster):
        coordinator = Coordinator.create(journal.path)
        with watched_machines(coordinator, journal, grace_s=plan.config.cluster.grace_s) as machines:
            rows = patient(journal, pause=machines.pause)
            everyone = teacher_needs(plan.config.teacher) | student_needs(plan.config.student)
            available = _room(plan, everyone, rows, unless=machines.require_driver)
            _require_shared_places(plan, available, at_store=[plan.config.teacher, plan.config.student], learning=True)
            students = _Background(
                lambda: _learn(plan, rows, owner.number, available=available, coordinator=coordinator, teachers_at_work=True)
            )

            def finished() -> bool:
                owner.require()
                done = students.finished() or machines.nobody_commits()
                if done:
                    machines.require_driver()
                return done

            _teach(plan, rows, available=available, coordinator=coordinator, readers=("student",), finished=finished)
        _evaluate(plan, patient(journal), available=available, coordinator=coordinator)
    _report(plan.run_dir)


def evaluate_run(plan: Plan, *, command: str = "stillhouse eval") -> dict[ModelName, Scores]:
    """Score teacher, student and control on the held-out split, and journal the scores."""
    holder = Holder.here(command, plan.run_dir, now=time())
    with locked(plan.run_dir, holder), driver_log(plan.run_dir), attached(plan.config.cluster) as available:
        journal = Journal(plan.run_dir / "journal.jsonl")
        earlier = JournalReader(journal.path)
        earlier.new_rows()
        with shown(earlier, [ProgressView()]):
            return _evaluate(plan, patient(journal), available=available, coordinator=Coordinator.create(journal.path))


def open_run(run_dir: Path, *, cache_dir: Path) -> Plan:
    """The plan of a run directory that exists already. Raises RecipeError where it is none."""
    return resolved(config_of(run_dir), run_dir=run_dir, cache_dir=cache_dir)


def export_run(plan: Plan, out: Path, *, role: Literal["student", "control"] = "student") -> int:
    """Write a trained model as a plain Hugging Face directory; returns the optimiser steps behind it."""
    from stillhouse.student.export import export  # DeepSpeed, which only this needs here, takes seconds to import

    job = next((job for job in plan.jobs() if job.role == role), None)
    if job is None:
        raise CheckpointError(f"this run has no {role}: evaluate.control is false in its config")
    return export(
        job.checkpoints,
        out,
        section=job.section,
        tokenizer=plan.tokenizer,
        card=lambda steps: model_card(plan, role, steps),
        tell=lambda seconds, why: say(f"the export has waited for {seconds:.0f} s: {why}"),
    )


def _room(plan: Plan, crews: ResourceNeeds, journal: Tracker, *, unless: Callable[[], None]) -> dict[str, float]:
    """The cluster's resources, once they suffice. `unless` raises where they are not waited for any more."""
    told = ""

    def waiting(missing: str) -> None:
        nonlocal told
        unless()
        if missing != told:
            journal.record(WaitRow(missing))
            told = missing

    available = await_room(crews, plan.config.cluster, waiting=waiting)
    if told:
        journal.record(WaitRow(""))
    return available


def _require_shared_places(
    plan: Plan, available: Mapping[str, float], *, at_store: Sequence[ModelSection], learning: bool, filling: bool = True
) -> None:
    """Of the machines of these crews the store, and of all machines the checkpoints: the student is scored where a teacher fits."""
    store = ChunkStore(plan.config.store.url, plan.recipe)
    crews = [placement(each, available) for each in at_store]
    require_shared(store.url, crews, what="chunks", setting="store.url", published="" if filling else store.recipe_key)
    if learning:
        everyone = [placement(each, available) for each in (plan.config.teacher, plan.config.student)]
        require_shared(plan.jobs()[0].checkpoints, everyone, what="checkpoints", setting="student.checkpoint_url")


def _require_shared_store(plan: Plan) -> None:
    if plan.config.store.url.startswith("memory:"):
        raise StoreError("a memory:// store cannot be shared between processes; give store.url a directory or a bucket")


def _teach(
    plan: Plan,
    journal: Tracker,
    *,
    available: Mapping[str, float],
    coordinator: Coordinator,
    readers: Collection[str],
    finished: Callable[[], bool],
    order: Sequence[int] | None = None,
) -> None:
    config = plan.config
    crew = RayCrew(
        TeacherJob(config.teacher, plan.recipe, config.store.url, config.cluster.threads, config.cluster.notices),
        where=placement(config.teacher, available),
        secrets=local_secrets(),
        coordinator=coordinator,
    )
    store = ChunkStore(config.store.url, plan.recipe)
    own = _join_readers(plan, store)
    pool = TeacherPool(
        crew,
        config.teacher,
        store=store,
        order=plan.chunks if order is None else order,
        item_of=plan.item,
        window_chunks=plan.window_chunks,
        journal=journal,
        retention=_retention(plan, store, own) if readers else None,
    )
    try:
        pool.run(readers=readers, coordinator=coordinator, finished=finished)
    except ChangedWeightsError:
        forget_identity(config.teacher, cache_dir=plan.cache_dir)
        raise


def _retention(plan: Plan, store: ChunkStore, own: Collection[str]) -> Retention:
    """The readers of the run's store, its own students among them."""

    def position(reader: Consumer) -> int | None:
        same_order = (reader.seed, reader.window_chunks) == (plan.order.seed, plan.order.window_chunks)
        return order_of(reader, plan.recipe).chunks_finished(reader.committed_step) if same_order else None

    return Retention(
        store,
        own=own,
        deletes=plan.config.store.retain == "until-read",
        least_ahead=chunks_read_ahead(plan.order),
        done_after=lambda reader: order_of(reader, plan.recipe).steps_until_done_with(reader.total_steps),
        position=position,
    )


def _join_readers(plan: Plan, store: ChunkStore) -> list[str]:
    """Register the run's students, and those alone, before anybody counts on what is there; returns their names."""
    own = [job.reader(0) for job in plan.jobs()]
    for reader in own:
        join(store, reader)
    names = [reader.name for reader in own]
    for role in ("student", "control"):
        if (name := consumer_name(resume_location(plan.config.student, plan.run_dir), role)) not in names:
            leave(store, name)  # of an earlier attempt with another config: it would keep every chunk for ever
    return names


def _learn(
    plan: Plan, journal: Tracker, owner: int, *, available: Mapping[str, float], coordinator: Coordinator, teachers_at_work: bool
) -> None:
    fit(
        [replace(job, owner=owner) for job in plan.jobs()],
        where=placement(plan.config.student, available),
        threads=plan.config.cluster.threads,
        secrets=local_secrets(),
        notices=plan.config.cluster.notices,
        coordinator=coordinator,
        teachers_at_work=teachers_at_work,
        journal=journal,
    )


def _evaluate(plan: Plan, journal: Tracker, *, available: Mapping[str, float], coordinator: Coordinator) -> dict[ModelName, Scores]:
    config = plan.config
    where = placement(config.teacher, available)
    models: dict[ModelName, Trained] = {job.role: Trained(job.section, job.checkpoints, coordinator) for job in plan.jobs()}
    steps: dict[ModelName, int] = {"teacher": 0}
    ask = partial(insist, patience=DEFAULT_PATIENCE, tell=outage_teller(journal))
    steps.update({job.role: newest_step(job.checkpoints, ask=ask) for job in plan.jobs()})
    comparison = EvaluationJob(
        teacher=config.teacher,
        models=models,
        vocab_size=plan.recipe.vocab_size,
        section=config.evaluate,
        device=where.device,
        threads=config.cluster.threads,
        secrets=local_secrets(),
        log=coordinator.log,
    )
    scores: dict[ModelName, Scores] = call_remotely(evaluate, comparison, whole(plan.sources.heldout), where=where)
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
