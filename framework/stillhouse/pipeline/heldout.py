"""The held-out text that students are scored on while they learn: which sequences, and how their
teacher's part is published before the first step."""

import hashlib

import numpy as np

from stillhouse.cluster.processes import call_remotely
from stillhouse.errors import ConfigError
from stillhouse.evaluation.heldout import publish_heldout
from stillhouse.evaluation.scores import outage_teller
from stillhouse.pipeline.plan import Evaluation
from stillhouse.pipeline.scoring import evaluation_job
from stillhouse.pipeline.session import Session
from stillhouse.retry import DEFAULT_PATIENCE, Tell, insist
from stillhouse.sequence import Sequences, joined
from stillhouse.sequences.source import SequenceSource
from stillhouse.store import Recipe
from stillhouse.store.object_store import Blobs
from stillhouse.student.best import read_history
from stillhouse.student.job import HeldoutPlan, TrainJob
from stillhouse.tracking import PhaseEvent

_FOLDER, _DIGITS = "heldout", 16


def publish(evaluation: Evaluation, session: Session) -> HeldoutPlan | None:
    """The plan that ranks score students by while they learn, None where the config does not ask
    for it. What they need of the teacher is published first, by a process that has room for one,
    unless it is there already."""
    if evaluation.section.every_steps == 0:
        return None
    sequences = scored_sequences(evaluation)
    plan = _plan_of(evaluation, sequences)
    blobs = Blobs(evaluation.jobs[0].checkpoints_root)
    tell = outage_teller(session.journal)
    if insist(lambda: blobs.stat(plan.key), patience=DEFAULT_PATIENCE, tell=tell) is None:
        session.journal.record(PhaseEvent("run", "scoring the held-out text with the teacher"))
        where = session.place_of(evaluation.teacher)
        own = evaluation_job(evaluation, session, where=where, models={})
        call_remotely(
            publish_heldout, own, sequences, blobs.url, plan.key, session.coordinator, where=where
        )
    return plan


def best_score(evaluation: Evaluation, job: TrainJob, *, tell: Tell) -> tuple[int, float] | None:
    """The step after which a student's held-out KL was lowest, and that KL; None where
    evaluate.keep_best is false, or there is no score. Waits while the store is unavailable, and
    reports that to `tell`."""
    if not evaluation.section.keep_best:
        return None
    key = history_key(evaluation, job)
    return read_history(Blobs(job.checkpoints_root), key, tell=tell).best


def history_key(evaluation: Evaluation, job: TrainJob) -> str:
    """The key of a student's held-out scores so far, under the root of its checkpoints."""
    return _plan_of(evaluation, scored_sequences(evaluation)).history_key(job.role)


def best_step(evaluation: Evaluation, job: TrainJob, *, tell: Tell) -> int:
    """The step after which a student's held-out KL was lowest. Raises ConfigError where it was not
    kept."""
    best = best_score(evaluation, job, tell=tell)
    if best is None:
        kept = evaluation.section.keep_best
        found = "it has no score yet" if kept else "evaluate.keep_best is false"
        raise ConfigError(
            f"no best checkpoint of the {job.role} was kept: {found}; train with "
            "evaluate.every_steps and evaluate.keep_best = true, or leave --best out"
        )
    step, _ = best
    return step


def scored_sequences(evaluation: Evaluation) -> Sequences:
    """The held-out text that students are scored on while they learn."""
    wanted = evaluation.section.tokens_while_learning
    return first_sequences(evaluation.heldout, num_targets=wanted)


def _plan_of(evaluation: Evaluation, sequences: Sequences) -> HeldoutPlan:
    section, recipe = evaluation.section, evaluation.jobs[0].recipe
    name = _fingerprint(recipe, sequences, dtype=evaluation.teacher.dtype)
    return HeldoutPlan(
        section.every_steps,
        f"{_FOLDER}/{name}.safetensors",
        section.block_tokens,
        section.patience,
        section.keep_best,
    )


def first_sequences(source: SequenceSource, *, num_targets: int) -> Sequences:
    """The first sequences of a source that have `num_targets` target tokens, or all of them."""
    parts: list[Sequences] = []
    wanted = num_targets
    for number in range(source.num_blocks):
        block = source.block(number)
        ends_S = np.cumsum(block.loss_mask_SL.sum(axis=1, dtype=np.int64))
        num_rows = min(int(np.searchsorted(ends_S, wanted)) + 1, len(block))
        parts.append(block.select(slice(0, num_rows)))
        wanted -= int(ends_S[num_rows - 1])
        if wanted <= 0:
            break
    return joined(parts)


def _fingerprint(recipe: Recipe, sequences: Sequences, *, dtype: str) -> str:
    """A name for all that decides the teacher's part."""
    digest = hashlib.sha256(f"{recipe.teacher_digest} {dtype} {recipe.vocab_size}".encode())
    for array in sequences.arrays:
        digest.update(f" {array.shape} {array.dtype.str} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:_DIGITS]
