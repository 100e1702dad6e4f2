"""The held-out text that students are scored on while they learn: which sequences, and how their
teacher's part is published before the first step."""

import hashlib

import numpy as np

from stillhouse.cluster.processes import call_remotely
from stillhouse.evaluation.heldout import publish_heldout
from stillhouse.evaluation.scores import outage_teller
from stillhouse.pipeline.plan import Evaluation
from stillhouse.pipeline.scoring import evaluation_job
from stillhouse.pipeline.session import Session
from stillhouse.retry import DEFAULT_PATIENCE, insist
from stillhouse.sequence import Sequences, joined
from stillhouse.sequences.source import SequenceSource
from stillhouse.store import Recipe
from stillhouse.store.object_store import Blobs
from stillhouse.student.job import HeldoutPlan

_FOLDER, _DIGITS = "heldout", 16


def publish(evaluation: Evaluation, session: Session) -> HeldoutPlan | None:
    """The plan that ranks score students by while they learn, None where the config does not ask
    for it. What they need of the teacher is published first, by a process that has room for one,
    unless it is there already."""
    section, job = evaluation.section, evaluation.jobs[0]
    if section.every_steps == 0:
        return None
    # which text, and under which name
    sequences = first_sequences(evaluation.heldout, num_targets=section.tokens_while_learning)
    name = _fingerprint(job.recipe, sequences, dtype=evaluation.teacher.dtype)
    plan = HeldoutPlan(section.every_steps, f"{_FOLDER}/{name}.safetensors", section.block_tokens)
    # the teacher's part
    blobs = Blobs(job.checkpoints_root)
    tell = outage_teller(session.journal)
    if insist(lambda: blobs.stat(plan.key), patience=DEFAULT_PATIENCE, tell=tell) is None:
        where = session.place_of(evaluation.teacher)
        own = evaluation_job(evaluation, session, where=where, models={})
        call_remotely(
            publish_heldout, own, sequences, blobs.url, plan.key, session.coordinator, where=where
        )
    return plan


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
