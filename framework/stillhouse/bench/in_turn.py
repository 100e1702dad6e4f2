"""The baseline of the pipeline: teacher and student in turn in one process, in plain PyTorch, with
no store, codec, Ray or DeepSpeed.

Two forms: "compressed" has the library's own kernels, so that only the machinery around them is
compared; "dense" is the usual first version, the full logits of both models and torch's KL.
Batches, micro-batches, loss and optimiser are those of the pipeline.

Shapes: S sequences of one step, B of one micro-batch, L positions, T target tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from time import monotonic
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stillhouse.config import StudentSection, TeacherSection
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.logits import CompressedLogits, concatenate
from stillhouse.losses.distillation import distillation_loss
from stillhouse.losses.divergences import divergence_named
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.models.heads import head_of
from stillhouse.models.load import load_model
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Recipe

Form = Literal["compressed", "dense"]


@dataclass(frozen=True, slots=True)
class Lesson:
    """Everything that the process needs; can be pickled for a fresh one."""

    form: Form
    teacher: TeacherSection
    student: StudentSection
    recipe: Recipe
    rows: Sequences  # in training order, a whole number of global batches
    threads: int


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One optimiser step: teacher, forward, backward, update."""

    loss: float  # mean over its target tokens, nats
    num_tokens: int  # target tokens
    teacher_s: float
    seconds: float  # the whole step, the teacher included


class _Lean:
    """Top-k targets straight from the head, and the fused sparse loss."""

    def __init__(self, lesson: Lesson):
        self._section, self._recipe = lesson.student, lesson.recipe
        self._teacher = TransformersEngine(lesson.teacher, lesson.recipe, device="cpu")
        self._divergence = divergence_named(lesson.student.divergence, lesson.student.mix)

    def targets(self, rows: Sequences) -> list[CompressedLogits]:
        whole = concatenate(self._teacher.targets(WorkItem(0, rows)))
        ends = [0]
        for part in _split(rows, self._section.micro_batch_sequences):
            ends.append(ends[-1] + part.num_targets)
        return [whole.map(itemgetter(slice(*span))) for span in pairwise(ends)]

    def loss(self, student: PreTrainedModel, batch: TokenBatch, target: CompressedLogits) -> Tensor:
        terms = distillation_loss(
            hidden_at(student, batch),
            head_of(student, vocab_size=self._recipe.vocab_size),
            target,
            divergence=self._divergence,
            block_tokens=self._section.block_tokens,
        )
        return terms.total


class _Dense:
    """Both models' full logits, and torch's own KL."""

    def __init__(self, lesson: Lesson):
        self._section, self._vocab_size = lesson.student, lesson.recipe.vocab_size
        self._teacher = load_model(lesson.teacher)

    @torch.no_grad()
    def targets(self, rows: Sequences) -> list[Tensor]:
        return [
            self._logprobs(self._teacher, TokenBatch.of(part))
            for part in _split(rows, self._section.micro_batch_sequences)
        ]

    def loss(self, student: PreTrainedModel, batch: TokenBatch, target_TV: Tensor) -> Tensor:
        logq_TV = self._logprobs(student, batch)
        return functional.kl_div(logq_TV, target_TV, reduction="sum", log_target=True)

    def _logprobs(self, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
        logits_BLV = model(
            input_ids=batch.token_ids_BL, position_ids=batch.positions_BL, use_cache=False
        ).logits
        logits_TV = logits_BLV.flatten(0, 1)[batch.target_positions_T, : self._vocab_size]
        return functional.log_softmax(logits_TV.float(), dim=-1)


def train_in_turn(lesson: Lesson) -> list[TimedStep]:
    """Train on the lesson's batches, in this process, with `threads` torch threads; the learning
    rate is constant."""
    torch.set_num_threads(lesson.threads)
    section = lesson.student
    init_seed = section.seed if section.init == "config" else None
    student = load_model(section, random_init_seed=init_seed).train()
    form = _Lean(lesson) if lesson.form == "compressed" else _Dense(lesson)
    optimizer = _adamw(student, section)
    return [
        _step(rows, form, student, optimizer, section)
        for rows in _split(lesson.rows, section.global_batch_sequences)
    ]


def _step(
    rows: Sequences,
    form: _Lean | _Dense,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    section: StudentSection,
) -> TimedStep:
    began = monotonic()
    targets: list[Any] = form.targets(rows)
    taught = monotonic()
    num_tokens, total = rows.num_targets, 0.0
    for part, target in zip(_split(rows, section.micro_batch_sequences), targets, strict=True):
        loss = form.loss(student, TokenBatch.of(part), target)
        (loss / num_tokens).backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(student.parameters(), section.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    return TimedStep(total / num_tokens, num_tokens, taught - began, monotonic() - began)


def _split(rows: Sequences, num_sequences: int) -> Iterator[Sequences]:
    return (
        rows.select(slice(start, start + num_sequences))
        for start in range(0, len(rows), num_sequences)
    )


def _adamw(model: PreTrainedModel, section: StudentSection) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas)
