"""Evaluation: teacher, student and control side by side on held-out text, with dense distributions,
in token blocks.

No compressed target is used, so the scores have none of their error.

Shapes: B sequences, L positions, T tokens, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.cluster.processes import Secrets, prepare_process
from stillhouse.config import EvaluateSection, ModelSection, StudentSection
from stillhouse.logits import Head
from stillhouse.models import head_of, load_model
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.retry import Tell
from stillhouse.sequence import Sequences
from stillhouse.tracking import OutageEvent, Tracker
from stillhouse.tracking.log import LogPlace, process_log

ModelName = Literal["teacher", "student", "control"]

_NUM_BINS = 15


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one model: means over the held-out target tokens, in nats."""

    num_tokens: int
    cross_entropy: float
    kl: float  # KL(teacher || model); 0 for the teacher itself
    agreement: float  # share of tokens where the model's first choice is the teacher's (top-1)
    # expected calibration error of the first choice, in 15 bins of equal width (arXiv 1706.04599)
    calibration_error: float
    # mean of sum_v min(p, q): the share of drafts that speculative decoding accepts (2211.17192)
    acceptance: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A model in its newest commit, which the process that scores it reads."""

    section: StudentSection
    checkpoints: str  # a URL
    tracker: Tracker  # journals an outage of their store, which is waited for


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """Which models to score, and how. All are compared with `teacher`, which is scored as well."""

    teacher: ModelSection
    models: Mapping[ModelName, ModelSection | Trained]
    vocab_size: int
    section: EvaluateSection
    device: str
    threads: int
    secrets: Secrets
    log: LogPlace | None = None


def evaluate(job: EvaluationJob, heldout: Sequences) -> dict[ModelName, Scores]:
    """Scores of the teacher and of each model, by name, on the target tokens of `heldout` (those of
    its loss mask). Computed in the calling process."""
    prepare_process(job.device, job.threads)
    job.secrets.adopt()
    with process_log("evaluation", job.log):
        return _evaluated(job, heldout)


def _evaluated(job: EvaluationJob, heldout: Sequences) -> dict[ModelName, Scores]:
    """All models at the same time: no distribution is kept beyond its block of tokens."""
    models: dict[ModelName, ModelSection | Trained] = {"teacher": job.teacher, **job.models}
    scorers = {name: _scorer(model, job) for name, model in models.items()}
    tallies = {name: _Tally() for name in scorers}
    with torch.inference_mode():
        for start in range(0, len(heldout), job.section.batch_sequences):
            batch = TokenBatch.of(heldout.select(slice(start, start + job.section.batch_sequences)))
            hidden = {name: scorer.hidden(batch) for name, scorer in scorers.items()}
            for first in range(0, len(batch.labels_T), job.section.block_tokens):
                block = slice(first, first + job.section.block_tokens)
                logprobs = {
                    name: scorer.logprobs(hidden[name][block]) for name, scorer in scorers.items()
                }
                for name, tally in tallies.items():
                    tally.add(logprobs["teacher"], logprobs[name], batch.labels_T[block])
    return {name: tally.scores() for name, tally in tallies.items()}


@dataclass(frozen=True, slots=True)
class _Scorer:
    """A model, and its head as it is read off it."""

    model: PreTrainedModel
    head: Head

    def hidden(self, batch: TokenBatch) -> Tensor:
        return hidden_at(self.model, batch)

    def logprobs(self, hidden_TH: Tensor) -> Tensor:
        logits_TV = self.head.logits(hidden_TH.to(self.head.weight_VH.device))
        return torch.log_softmax(logits_TV.float(), dim=-1)


def _scorer(wanted: ModelSection | Trained, job: EvaluationJob) -> _Scorer:
    if isinstance(wanted, Trained):
        # late: DeepSpeed takes seconds to import
        from stillhouse.student.export import load_trained

        tell = outage_teller(wanted.tracker)
        trained, _ = load_trained(wanted.checkpoints, wanted.section, tell=tell)
        model: Any = trained.eval().to(job.device)
    else:
        many_gpus = job.device == "cuda" and torch.cuda.device_count() > 1
        model = load_model(wanted, device_map="auto" if many_gpus else job.device)
    return _Scorer(model, head_of(model, vocab_size=job.vocab_size))


def outage_teller(tracker: Tracker) -> Tell:
    """A function that journals that the checkpoints' store is waited for."""
    return lambda seconds, why: tracker.record(OutageEvent("the evaluation", seconds, why))


@dataclass(slots=True)
class _Tally:
    """Sums over tokens, in float64: their order changes no digit that is shown."""

    num_tokens: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    # count, confidence, correct
    bins: Tensor = field(default_factory=lambda: torch.zeros(3, _NUM_BINS, dtype=torch.float64))

    def add(self, teacher_TV: Tensor, model_TV: Tensor, labels_T: Tensor) -> None:
        """Add one block of tokens. It is computed on the device of the teacher's values; only the
        sums are copied to the CPU."""
        # the sums
        model_TV, labels_T = model_TV.to(teacher_TV.device), labels_T.to(teacher_TV.device)
        p_TV = teacher_TV.exp()
        confidence_T, choice_T = model_TV.max(dim=-1)
        confidence_T = confidence_T.exp()
        cross_entropy = -model_TV.gather(1, labels_T[:, None]).sum(dtype=torch.float64)
        kl = torch.where(p_TV > 0, p_TV * (teacher_TV - model_TV), 0.0).sum(dtype=torch.float64)
        agreement = (choice_T == teacher_TV.argmax(dim=-1)).sum(dtype=torch.float64)
        acceptance = torch.minimum(p_TV, model_TV.exp()).sum(dtype=torch.float64)
        self.num_tokens += len(labels_T)
        self.sums += torch.stack([cross_entropy, kl, agreement, acceptance]).cpu()

        # the bins
        bins_T = (confidence_T * _NUM_BINS).long().clamp_max(_NUM_BINS - 1)
        correct_T = (choice_T == labels_T).double()
        found = torch.zeros(3, _NUM_BINS, dtype=torch.float64, device=bins_T.device)
        found.index_add_(
            1, bins_T, torch.stack([torch.ones_like(correct_T), confidence_T.double(), correct_T])
        )
        self.bins += found.cpu()

    def scores(self) -> Scores:
        cross_entropy, kl, agreement, acceptance = (self.sums / max(1, self.num_tokens)).tolist()
        _, confidence_B, correct_B = self.bins
        calibration_error = float((confidence_B - correct_B).abs().sum()) / max(1, self.num_tokens)
        return Scores(self.num_tokens, cross_entropy, kl, agreement, calibration_error, acceptance)
