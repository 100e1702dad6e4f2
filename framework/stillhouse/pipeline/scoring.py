"""The scores of a run: its teacher, student and control on the held-out split, in one process where
the largest of them fits."""

from collections.abc import Mapping
from functools import partial

from stillhouse.checkpoint.choice import newest_step
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import call_remotely, local_secrets
from stillhouse.config import ModelSection
from stillhouse.evaluation.scores import (
    EvaluationJob,
    ModelName,
    Trained,
    evaluate,
    outage_teller,
)
from stillhouse.losses.score import Scores
from stillhouse.pipeline.plan import Evaluation
from stillhouse.pipeline.session import Session
from stillhouse.retry import DEFAULT_PATIENCE, insist
from stillhouse.sequences.source import whole
from stillhouse.tracking import EvalEvent, PhaseEvent


def evaluation_job(
    evaluation: Evaluation,
    session: Session,
    *,
    where: Placement,
    models: Mapping[ModelName, ModelSection | Trained],
) -> EvaluationJob:
    """The job of a process that has the teacher, and scores these models beside it. A teacher
    without weights has no whole distributions to compare with."""
    return EvaluationJob(
        teacher=evaluation.teacher if evaluation.teacher.has_weights else None,
        models=models,
        vocab_size=evaluation.jobs[0].recipe.vocab_size,
        section=evaluation.section,
        device=where.device,
        threads=session.cluster.threads,
        secrets=local_secrets(),
        log=session.coordinator.log,
    )


def score(evaluation: Evaluation, session: Session) -> dict[ModelName, Scores]:
    """Score the newest commits, and journal the scores."""
    # what is scored, and where
    jobs, has_teacher = evaluation.jobs, evaluation.teacher.has_weights
    largest = evaluation.teacher if has_teacher else jobs[0].section
    where = session.place_of(largest)
    ask = partial(insist, patience=DEFAULT_PATIENCE, tell=outage_teller(session.journal))
    steps = {job.role: newest_step(job.checkpoints, ask=ask) for job in jobs}
    trained: dict[ModelName, ModelSection | Trained] = {
        job.role: Trained(job.section, job.checkpoints, session.coordinator) for job in jobs
    }
    job = evaluation_job(evaluation, session, where=where, models=trained)

    # in one process of the cluster
    session.journal.record(PhaseEvent("run", "evaluating"))
    scores: dict[ModelName, Scores] = call_remotely(
        evaluate, job, whole(evaluation.heldout), where=where
    )
    for name, found in scores.items():
        is_compared = name != "teacher" and has_teacher
        session.journal.record(
            EvalEvent(
                model=name,
                step=0 if name == "teacher" else steps[name],
                num_tokens=found.num_tokens,
                cross_entropy=found.cross_entropy,
                kl=found.kl if is_compared else None,
                agreement=found.agreement if is_compared else None,
                calibration_error=found.calibration_error,
                acceptance=found.acceptance if is_compared else None,
            )
        )
    return scores
