"""The commands of a run as functions of its plan: produce, train, run, evaluate, repair.

Each reads what is on disk, so each can be stopped at any moment and given again. `command` is what
the user typed, for the journal.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.placement import student_needs, teacher_needs
from stillhouse.cluster.session import attached
from stillhouse.evaluation.scores import ModelName
from stillhouse.losses.score import Scores
from stillhouse.pipeline import heldout
from stillhouse.pipeline.attempt import attempt, learning_attempt, visit
from stillhouse.pipeline.console import patient, tell_of_wait
from stillhouse.pipeline.cuts import make_cut
from stillhouse.pipeline.labels import leave_label
from stillhouse.pipeline.plan import Plan
from stillhouse.pipeline.planning import resolved
from stillhouse.pipeline.run_dir import config_of
from stillhouse.pipeline.run_store import (
    register,
    register_if_allowed,
    require_chunks,
    require_shareable,
    retention_of,
    store_to_read,
)
from stillhouse.pipeline.scoring import score
from stillhouse.pipeline.session import Session, at_work, enough_room, on_ray
from stillhouse.pipeline.shared_dirs import require_shared_checkpoints, require_shared_store
from stillhouse.pipeline.students import students_at_work
from stillhouse.pipeline.teachers import answering, teacher_pool
from stillhouse.report import write_report
from stillhouse.retry import insist
from stillhouse.tracking import ROOM_PATIENCE, EarlyStopEvent, Tracker, read_journal
from stillhouse.tracking.log import terminal_log


def produce(plan: Plan, *, command: str = "stillhouse produce") -> None:
    """Fill the store with every chunk that training will read."""
    config, store = plan.config, plan.store
    with (
        attempt(plan.request, command) as journal,
        answering(plan.targets),
        on_ray(config.cluster, journal),
        at_work(config.cluster, journal, teacher_needs(config.teacher)) as (session, machines),
    ):
        require_shared_store(store, [session.place_of(config.teacher)], filling=True)
        register(store, plan.jobs)
        leave_label(plan)

        def finished() -> bool:
            machines.require_driver()
            return True

        with teacher_pool(plan.targets, session) as pool:
            pool.run(readers=(), coordinator=session.coordinator, finished=finished)


def repair(plan: Plan, numbers: Sequence[int], *, journal: Tracker) -> None:
    """Make exactly these chunks again, which are out of the store already; no run directory and no
    student is used."""
    config, store = plan.config, plan.store
    require_shareable(store.url)
    with terminal_log(), attached(config.cluster):
        needs = teacher_needs(config.teacher)
        available = enough_room(needs, config.cluster, journal, unless=lambda: None)
        session = Session(config.cluster, available, Coordinator.create(), journal)
        require_shared_store(store, [session.place_of(config.teacher)], filling=True)
        register(store, plan.jobs)
        with teacher_pool(replace(plan.targets, chunks=numbers), session) as pool:
            pool.run(readers=(), coordinator=session.coordinator, finished=lambda: True)


def train(plan: Plan, *, command: str = "stillhouse train") -> dict[ModelName, Scores]:
    """Train on a store that already holds what is needed, then evaluate and report. Raises
    StoreError where chunks are missing."""
    config, store, jobs = plan.config, plan.store, plan.jobs
    with (
        learning_attempt(plan.request, command, jobs=jobs, open_store=store_to_read) as (
            journal,
            owner,
        ),
        on_ray(config.cluster, journal),
    ):
        with at_work(config.cluster, journal, student_needs(config.student)) as (session, machines):
            teachers, ranks = session.place_of(config.teacher), session.place_of(config.student)
            require_shared_store(store, [ranks], filling=False)
            require_shared_checkpoints(jobs[0].checkpoints, [teachers, ranks])
            make_cut(plan, [teachers, ranks])
            register_if_allowed(store, jobs)
            require_chunks(store, plan.chunks)  # another run may have deleted some just before
            held = heldout.publish(plan.evaluation, session)
            with students_at_work(session, jobs, owner=owner.number, heldout=held) as students:
                students.join(unless=lambda: owner.is_lost() or machines.no_rank_commits())
            owner.require()
            machines.require_driver()
        scores = score(plan.evaluation, session)
    _report(plan.run_dir)
    return scores


def run(plan: Plan, *, command: str = "stillhouse run") -> dict[ModelName, Scores]:
    """Produce and train at the same time, then evaluate and report. On an existing run directory it
    goes on where it stopped."""
    config, store, jobs = plan.config, plan.store, plan.jobs
    needs = teacher_needs(config.teacher) | student_needs(config.student)
    with (
        learning_attempt(plan.request, command, jobs=jobs) as (journal, owner),
        answering(plan.targets),
        on_ray(config.cluster, journal),
    ):
        with at_work(config.cluster, journal, needs) as (session, machines):
            # all machines see what they have to, and other runs see these students
            teachers, ranks = session.place_of(config.teacher), session.place_of(config.student)
            require_shared_store(store, [teachers, ranks], filling=True)
            require_shared_checkpoints(jobs[0].checkpoints, [teachers, ranks])
            make_cut(plan, [teachers, ranks])
            own, deletes = register(store, jobs), config.store.retain == "until-read"
            consumers = retention_of(store, plan.order, own=own, deletes=deletes)
            leave_label(plan)

            # teachers fill the store while students read it
            held = heldout.publish(plan.evaluation, session)
            with (
                students_at_work(
                    session, jobs, owner=owner.number, heldout=held, with_teachers=True
                ) as students,
                teacher_pool(plan.targets, session, consumers=consumers) as pool,
            ):

                def finished() -> bool:
                    owner.require()
                    done = students.finished() or machines.no_rank_commits()
                    if done:
                        machines.require_driver()
                    return done

                pool.run(
                    readers=("student",),
                    coordinator=session.coordinator,
                    finished=finished,
                    enough=lambda: _stopped_early(plan.run_dir),
                )

        # what came of it
        scores = score(plan.evaluation, session)
    _report(plan.run_dir)
    return scores


def evaluate_run(plan: Plan, *, command: str = "stillhouse eval") -> dict[ModelName, Scores]:
    """Score teacher, student and control on the held-out split, and journal the scores."""
    cluster = plan.config.cluster
    with visit(plan.run_dir, command) as journal, on_ray(cluster, journal) as available:
        coordinator = Coordinator.create(journal.path)
        session = Session(cluster, available, coordinator, patient(journal))
        return score(plan.evaluation, session)


def open_run(run_dir: Path, *, cache_dir: Path) -> Plan:
    """The plan of a run directory that exists already. Raises RecipeError where it is none."""
    return resolved(config_of(run_dir), run_dir=run_dir, cache_dir=cache_dir)


def _stopped_early(run_dir: Path) -> bool:
    """Whether a student of the run has stopped before its last step: chunks that it would have read
    later need not be made."""
    events = read_journal(run_dir / "journal.jsonl")
    return any(isinstance(event, EarlyStopEvent) for event in events)


def _report(run_dir: Path) -> None:
    """Write the report, once there is room for it."""
    insist(lambda: write_report(run_dir), patience=ROOM_PATIENCE, tell=tell_of_wait)
