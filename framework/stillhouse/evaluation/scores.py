"""Evaluation: teacher, student and control side by side on held-out text, with dense distributions,
in token blocks.

No compressed target is used, so the scores have none of their error.

Shapes: B sequences, L positions, T tokens, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.cluster.processes import Secrets, prepare_process
from stillhouse.config import EvaluateSection, ModelSection, StudentSection
from stillhouse.logits import Head
from stillhouse.losses.score import (
    Scores,
    head_logprobs,
    no_sums,
    score_sums,
    scores_of,
    without_teacher,
)
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.models.heads import head_of
from stillhouse.models.load import load_model
from stillhouse.retry import Tell
from stillhouse.sequence import Sequences
from stillhouse.tracking import OutageEvent, Tracker
from stillhouse.tracking.log import LogPlace, process_log

ModelName = Literal["teacher", "student", "control"]


@dataclass(frozen=True, slots=True)
class Trained:
    """A model in its newest commit, which the process that scores it reads."""

    section: StudentSection
    checkpoints: str  # a URL
    tracker: Tracker  # journals an outage of their store, which is waited for


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """Which models to score, and how. All are compared with `teacher`, which is scored as well;
    None: its weights are not at hand, and nothing is compared with it."""

    teacher: ModelSection | None
    models: Mapping[ModelName, ModelSection | Trained]
    vocab_size: int
    section: EvaluateSection
    device: str
    threads: int
    secrets: Secrets
    log: LogPlace | None = None


def evaluate(job: EvaluationJob, heldout: Sequences) -> dict[ModelName, Scores]:
    """Scores of the teacher, if there is one, and of each model, by name, on the target tokens of
    `heldout` (those of its loss mask). Computed in the calling process."""
    prepare_process(job.device, job.threads)
    job.secrets.adopt()
    with process_log("evaluation", job.log):
        return _evaluated(job, heldout)


def _evaluated(job: EvaluationJob, heldout: Sequences) -> dict[ModelName, Scores]:
    """All models at the same time: no distribution is kept beyond its block of tokens."""
    models: dict[ModelName, ModelSection | Trained] = {**job.models}
    if job.teacher is not None:
        models = {"teacher": job.teacher, **models}
    scorers = {name: scorer_of(model, job) for name, model in models.items()}
    sums = {name: no_sums() for name in scorers}
    with torch.inference_mode():
        for start in range(0, len(heldout), job.section.batch_sequences):
            batch = TokenBatch.of(heldout.select(slice(start, start + job.section.batch_sequences)))
            hidden = {name: scorer.hidden(batch) for name, scorer in scorers.items()}
            for first in range(0, len(batch.labels_T), job.section.block_tokens):
                block = slice(first, first + job.section.block_tokens)
                logprobs = {
                    name: scorer.logprobs(hidden[name][block]) for name, scorer in scorers.items()
                }
                for name, sums_X in sums.items():
                    beside = logprobs.get("teacher", logprobs[name])
                    sums_X += score_sums(beside, logprobs[name], batch.labels_T[block]).cpu()
    scores = {name: scores_of(sums_X) for name, sums_X in sums.items()}
    if job.teacher is None:
        return {name: without_teacher(found) for name, found in scores.items()}
    return scores


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model, and its head as it is read off it."""

    model: PreTrainedModel
    head: Head

    def hidden(self, batch: TokenBatch) -> Tensor:
        return hidden_at(self.model, batch)

    def logprobs(self, hidden_TH: Tensor) -> Tensor:
        return head_logprobs(hidden_TH, self.head)


def scorer_of(wanted: ModelSection | Trained, job: EvaluationJob) -> Scorer:
    """The model, loaded on the device of the job."""
    if isinstance(wanted, Trained):
        # late: DeepSpeed takes seconds to import
        from stillhouse.student.export import load_trained

        tell = outage_teller(wanted.tracker)
        trained, _ = load_trained(wanted.checkpoints, wanted.section, tell=tell)
        model: Any = trained.eval().to(job.device)
    else:
        many_gpus = job.device == "cuda" and torch.cuda.device_count() > 1
        model = load_model(wanted, device_map="auto" if many_gpus else job.device)
    return Scorer(model, head_of(model, vocab_size=job.vocab_size))


def outage_teller(tracker: Tracker) -> Tell:
    """A function that journals that the checkpoints' store is waited for."""
    return lambda seconds, why: tracker.record(OutageEvent("the evaluation", seconds, why))
