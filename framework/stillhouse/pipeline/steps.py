"""The verbs of a run as functions of its plan. Each reads what is on disk, so each can be stopped anywhere and done again.

`command` is what the user typed, for the journal.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from stillhouse.cluster import Board, attached, call_remotely, local_secrets, placement, require_room, student_crew, teacher_crew
from stillhouse.config import ModelSection
from stillhouse.errors import CheckpointError, StoreError
from stillhouse.evaluate import EvaluationJob, ModelName, Scores, evaluate, exported
from stillhouse.pipeline.directory import attempt, config_of, model_card
from stillhouse.pipeline.plan import Plan, plan
from stillhouse.report import write_report
from stillhouse.store import ChunkStore
from stillhouse.student.workers import fit
from stillhouse.teacher.actor import TeacherJob
from stillhouse.teacher.pool import TeacherPool
from stillhouse.tracking import EvalRow, Journal, Tracker


def produce(made: Plan, *, command: str = "stillhouse produce") -> None:
    """Fill the store with every chunk that training will read."""
    _require_shared_store(made)
    with attempt(made, command) as journal, attached(made.config.cluster) as available:
        require_room(teacher_crew(made.config.teacher), available)
        _teach(made, journal, available=available, board=Board.create(), readers=(), finished=lambda: True)


def repair(made: Plan, numbers: Sequence[int], *, journal: Tracker) -> None:
    """Have teachers make exactly these chunks, which are out of the store already; neither a run directory nor a student has a part."""
    _require_shared_store(made)
    with attached(made.config.cluster) as available:
        require_room(teacher_crew(made.config.teacher), available)
        _teach(made, journal, available=available, board=Board.create(), readers=(), finished=lambda: True, order=numbers)


def train(made: Plan, *, command: str = "stillhouse train") -> None:
    """Train on a store that already holds what is needed, then evaluate and report. Raises StoreError where chunks are missing."""
    missing = set(made.chunks) - ChunkStore.create(made.config.store.url, made.recipe).published()
    if missing:
        raise StoreError(
            f"{len(missing)} of {len(made.chunks)} chunks are not in {made.config.store.url}; "
            "`stillhouse produce` makes them, `stillhouse run` makes them and trains at the same time"
        )
    with attempt(made, command) as journal, attached(made.config.cluster) as available:
        require_room(student_crew(made.config.student), available)
        _learn(made, available=available, board=None)
        _evaluate(made, journal, available=available)
    write_report(made.run_dir)


def run(made: Plan, *, command: str = "stillhouse run") -> None:
    """Produce and train at the same time, then evaluate and report. On an existing run directory it goes on where it stopped."""
    _require_shared_store(made)
    with attempt(made, command) as journal, attached(made.config.cluster) as available:
        require_room(teacher_crew(made.config.teacher) | student_crew(made.config.student), available)
        board = Board.create()
        students = _Background(lambda: _learn(made, available=available, board=board))
        _teach(made, journal, available=available, board=board, readers=("student",), finished=students.finished)
        _evaluate(made, journal, available=available)
    write_report(made.run_dir)


def evaluate_run(made: Plan) -> dict[ModelName, Scores]:
    """Score teacher, student and control on the held-out split, and journal the scores."""
    with attached(made.config.cluster) as available:
        return _evaluate(made, Journal(made.run_dir / "journal.jsonl"), available=available)


def open_run(run_dir: Path, *, cache_dir: Path) -> Plan:
    """The plan of a run directory that exists already. Raises RecipeError where it is none."""
    return plan(config_of(run_dir), run_dir=run_dir, cache_dir=cache_dir)


def export_run(made: Plan, out: Path, *, role: Literal["student", "control"] = "student") -> int:
    """Write a trained model as a plain Hugging Face directory; returns the optimiser steps behind it."""
    from stillhouse.student.export import export  # DeepSpeed, which only this needs here, takes seconds to import

    job = next((job for job in made.jobs() if job.role == role), None)
    if job is None:
        raise CheckpointError(f"this run has no {role}: evaluate.control is false in its config")
    return export(job.checkpoints, out, section=job.section, tokenizer=made.tokenizer, card=model_card(made, role))


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
    pool = TeacherPool(
        TeacherJob(config.teacher, made.recipe, config.store.url, config.cluster.threads),
        where=placement(config.teacher, available),
        secrets=local_secrets(),
        order=made.chunks if order is None else order,
        item_of=made.item,
        window_chunks=made.window_chunks,
        journal=journal,
    )
    pool.run(readers=readers, board=board, finished=finished)


def _learn(made: Plan, *, available: Mapping[str, float], board: Board | None) -> None:
    section = made.config.student
    fit(
        made.jobs(),
        where=placement(section, available),
        num_workers=section.num_workers,
        threads=made.config.cluster.threads,
        secrets=local_secrets(),
        board=board,
        max_failures=section.max_failures,
    )


def _evaluate(made: Plan, journal: Journal, *, available: Mapping[str, float]) -> dict[ModelName, Scores]:
    config = made.config
    where = placement(config.teacher, available)
    steps: dict[ModelName, int] = {"teacher": 0}
    models: dict[ModelName, ModelSection] = {}
    for job in made.jobs():
        folder = (made.run_dir / "export" / job.role).resolve()
        steps[job.role] = export_run(made, folder, role=job.role)
        models[job.role] = exported(config.student, folder)
    comparison = EvaluationJob(
        teacher=config.teacher,
        models=models,
        vocab_size=made.recipe.vocab_size,
        section=config.evaluate,
        device=where.device,
        threads=config.cluster.threads,
        secrets=local_secrets(),
    )
    heldout = made.split.heldout
    scores: dict[ModelName, Scores] = call_remotely(evaluate, comparison, heldout.rows(0, heldout.num_sequences), where=where)
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


class _Background:
    """A call in a thread of its own: Ray Train's `fit` would take the main thread's Ctrl-C away."""

    def __init__(self, call: Callable[[], None]):
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="students", daemon=True)
        self._thread.start()

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
