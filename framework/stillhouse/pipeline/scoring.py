"""The scores of a run: its teacher, student and control on the held-out split, in one process where
a teacher fits."""

from functools import partial

from stillhouse.checkpoint.choice import newest_step
from stillhouse.cluster.processes import call_remotely, local_secrets
from stillhouse.evaluation.scores import (
    EvaluationJob,
    ModelName,
    Scores,
    Trained,
    evaluate,
    outage_teller,
)
from stillhouse.pipeline.plan import Plan
from stillhouse.pipeline.session import Session
from stillhouse.retry import DEFAULT_PATIENCE, insist
from stillhouse.sequences.source import whole
from stillhouse.tracking import EvalRow


def score(plan: Plan, session: Session) -> dict[ModelName, Scores]:
    """Score the newest commits, and journal the scores."""
    config, jobs = plan.config, plan.jobs()
    where = session.place_of(config.teacher)
    ask = partial(insist, patience=DEFAULT_PATIENCE, tell=outage_teller(session.journal))
    steps: dict[ModelName, int] = {
        "teacher": 0,
        **{job.role: newest_step(job.checkpoints, ask=ask) for job in jobs},
    }
    comparison = EvaluationJob(
        teacher=config.teacher,
        models={
            job.role: Trained(job.section, job.checkpoints, session.coordinator) for job in jobs
        },
        vocab_size=plan.recipe.vocab_size,
        section=config.evaluate,
        device=where.device,
        threads=config.cluster.threads,
        secrets=local_secrets(),
        log=session.coordinator.log,
    )
    scores: dict[ModelName, Scores] = call_remotely(
        evaluate, comparison, whole(plan.sources.heldout), where=where
    )
    for name, found in scores.items():
        session.journal.record(_row(name, found, step=steps[name]))
    return scores


def _row(name: ModelName, found: Scores, *, step: int) -> EvalRow:
    is_teacher = name == "teacher"  # which is compared with nobody
    return EvalRow(
        model=name,
        step=step,
        num_tokens=found.num_tokens,
        cross_entropy=found.cross_entropy,
        kl=None if is_teacher else found.kl,
        agreement=None if is_teacher else found.agreement,
        calibration_error=found.calibration_error,
        acceptance=None if is_teacher else found.acceptance,
    )
