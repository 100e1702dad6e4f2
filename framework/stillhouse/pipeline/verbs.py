"""The verbs of a run as functions of its plan. Each reads what is on disk, so each can be stopped
anywhere and done again.

`command` is what the user typed, for the journal.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.placement import student_needs, teacher_needs
from stillhouse.cluster.session import attached
from stillhouse.errors import ChangedWeightsError
from stillhouse.evaluation.scores import ModelName, Scores
from stillhouse.models import forget_identity
from stillhouse.pipeline.attempt import attempt, learning_attempt, visit
from stillhouse.pipeline.console import patient, tell_of_wait
from stillhouse.pipeline.plan import Plan, resolved
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
from stillhouse.pipeline.session import Session, at_work, enough_room
from stillhouse.pipeline.shared_dirs import require_shared_checkpoints, require_shared_store
from stillhouse.pipeline.workers import start_students, teacher_crew
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.report import write_report
from stillhouse.retry import insist
from stillhouse.teacher.pool import comparison, limits_of
from stillhouse.tracking import ROOM_PATIENCE, Tracker
from stillhouse.tracking.log import terminal_log


def produce(plan: Plan, *, command: str = "stillhouse produce") -> None:
    """Fill the store with every chunk that training will read."""
    config, needs = plan.config, teacher_needs(plan.config.teacher)
    require_shareable(config.store.url)
    with (
        attempt(plan, command) as journal,
        attached(config.cluster),
        at_work(config.cluster, journal, needs) as (session, machines),
    ):
        require_shared_store(plan.store, [session.place_of(config.teacher)], filling=True)

        def finished() -> bool:
            machines.require_driver()
            return True

        _teach(plan, session, chunks=plan.chunks, readers=(), finished=finished)


def repair(plan: Plan, numbers: Sequence[int], *, journal: Tracker) -> None:
    """Have teachers make exactly these chunks, which are out of the store already; neither a run
    directory nor a student has a part."""
    config = plan.config
    require_shareable(config.store.url)
    with terminal_log(), attached(config.cluster):
        available = enough_room(
            teacher_needs(config.teacher), config.cluster, journal, unless=lambda: None
        )
        session = Session(config.cluster, available, Coordinator.create(), journal)
        require_shared_store(plan.store, [session.place_of(config.teacher)], filling=True)
        _teach(plan, session, chunks=numbers, readers=(), finished=lambda: True)


def train(plan: Plan, *, command: str = "stillhouse train") -> dict[ModelName, Scores]:
    """Train on a store that already holds what is needed, then evaluate and report. Raises
    StoreError where chunks are missing."""
    config, jobs = plan.config, plan.jobs()
    with (
        learning_attempt(plan, command, open_store=store_to_read) as (journal, owner),
        attached(config.cluster),
    ):
        with at_work(config.cluster, journal, student_needs(config.student)) as (session, machines):
            teachers, ranks = session.place_of(config.teacher), session.place_of(config.student)
            require_shared_store(plan.store, [ranks], filling=False)
            require_shared_checkpoints(jobs[0].checkpoints, [teachers, ranks])
            register_if_allowed(plan.store, jobs)
            require_chunks(plan.store, plan.chunks)  # somebody may have deleted some just before
            students = start_students(session, jobs, owner=owner.number, teachers_at_work=False)
            students.join(unless=lambda: owner.is_lost() or machines.nobody_commits())
            owner.require()
            machines.require_driver()
        scores = score(plan, session)
    _report(plan.run_dir)
    return scores


def run(plan: Plan, *, command: str = "stillhouse run") -> dict[ModelName, Scores]:
    """Produce and train at the same time, then evaluate and report. On an existing run directory it
    goes on where it stopped."""
    config, jobs = plan.config, plan.jobs()
    require_shareable(config.store.url)
    with learning_attempt(plan, command) as (journal, owner), attached(config.cluster):
        needs = teacher_needs(config.teacher) | student_needs(config.student)
        with at_work(config.cluster, journal, needs) as (session, machines):
            teachers, ranks = session.place_of(config.teacher), session.place_of(config.student)
            require_shared_store(plan.store, [teachers, ranks], filling=True)
            require_shared_checkpoints(jobs[0].checkpoints, [teachers, ranks])
            students = start_students(session, jobs, owner=owner.number, teachers_at_work=True)

            def finished() -> bool:
                owner.require()
                done = students.finished() or machines.nobody_commits()
                if done:
                    machines.require_driver()
                return done

            _teach(plan, session, chunks=plan.chunks, readers=("student",), finished=finished)
        scores = score(plan, session)
    _report(plan.run_dir)
    return scores


def evaluate_run(plan: Plan, *, command: str = "stillhouse eval") -> dict[ModelName, Scores]:
    """Score teacher, student and control on the held-out split, and journal the scores."""
    cluster = plan.config.cluster
    with visit(plan.run_dir, command) as journal, attached(cluster) as available:
        return score(
            plan, Session(cluster, available, Coordinator.create(journal.path), patient(journal))
        )


def open_run(run_dir: Path, *, cache_dir: Path) -> Plan:
    """The plan of a run directory that exists already. Raises RecipeError where it is none."""
    return resolved(config_of(run_dir), run_dir=run_dir, cache_dir=cache_dir)


def _teach(
    plan: Plan,
    session: Session,
    *,
    chunks: Sequence[int],
    readers: Collection[str],
    finished: Callable[[], bool],
) -> None:
    """Have teachers make these chunks, as far ahead of the run's students as `readers` on the
    coordinator let them."""
    config, store = plan.config, plan.store
    own = register(store, plan.jobs())
    pool = Dispatcher(
        teacher_crew(session, config.teacher, store),
        limits_of(config.teacher),
        compare=comparison(plan.recipe),
        store=store,
        order=chunks,
        item_of=plan.item,
        window_chunks=plan.window_chunks,
        journal=session.journal,
        retention=retention_of(
            store, plan.order, own=own, deletes=config.store.retain == "until-read"
        )
        if readers
        else None,
    )
    try:
        pool.run(readers=readers, coordinator=session.coordinator, finished=finished)
    except ChangedWeightsError:
        forget_identity(config.teacher, cache_dir=plan.cache_dir)
        raise


def _report(run_dir: Path) -> None:
    """Write the report, once there is room for it."""
    insist(lambda: write_report(run_dir), patience=ROOM_PATIENCE, tell=tell_of_wait)
