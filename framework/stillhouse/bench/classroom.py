"""Students side by side in one process: the same initial weights, the same batches and one teacher.
They differ only in the form of their targets.

The targets are the real ones: compressed, encoded, decoded, and used by the fused loss. Only the
store, Ray and DeepSpeed are left out.

Shapes: S sequences, B of one step, L positions, T target tokens, H hidden, V vocabulary, N draws.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from stillhouse.bench.peers import Peer
from stillhouse.logits import (
    CompressedLogits,
    Head,
    TargetSpec,
    compress,
    decode,
    encode,
    token_seeds,
)
from stillhouse.losses.distillation import distillation_loss
from stillhouse.losses.divergences import forward_kl
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.models.heads import head_of
from stillhouse.pipeline.toy import Shape, Sizes, learning_rate_share, llama_config
from stillhouse.sequence import joined
from stillhouse.sequences.corpus import Corpus

Kind = Literal["text", "everything", "stored", "independent", "weighted", "peer"]


@dataclass(frozen=True, slots=True)
class Form:
    """What a student learns from: the text, the teacher's whole distribution, a record, or what
    another project has for one (`peer`).

    "independent" draws are those of RS-KD. "weighted" draws are from the teacher's distribution to
    the power `proposal` (arXiv 2503.16870, section 4.2); each has an importance weight of a byte.
    """

    name: str
    kind: Kind
    spec: TargetSpec
    ce_weight: float = 0.0  # of the text, beside a record
    proposal: float = 1.0
    peer: Peer | None = None

    @property
    def bytes_per_token(self) -> int | None:
        """At the vocabulary that is taught; None for the text and the whole distribution."""
        return self.bytes_at(self.spec.vocab_size)

    def bytes_at(self, vocab_size: int) -> int | None:
        """Of a token, at another vocabulary."""
        match self.kind:
            case "stored" | "independent":
                return replace(self.spec, vocab_size=vocab_size).bytes_per_token
            case "weighted":
                spec = replace(self.spec, vocab_size=vocab_size)
                return spec.bytes_per_token + spec.num_draws
            case "peer":
                assert self.peer is not None
                return self.peer.num_bytes(vocab_size)
        return None


@dataclass(frozen=True, slots=True)
class Lessons:
    """The schedule of every student."""

    num_steps: int
    batch_sequences: int
    shape: Shape
    learning_rate: float
    warmup_steps: int


@dataclass(frozen=True, slots=True)
class _Batch:
    tokens: TokenBatch
    seeds_T: Tensor  # of the draws


def teach(
    forms: list[Form],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    lessons: Lessons,
    *,
    seed: int,
    on_step: Callable[[], None],
) -> Mapping[str, PreTrainedModel]:
    """A trained student for each form, by name. `seed` decides the students' weights, the order of
    the sequences and all draws."""
    # equal students
    students = {form.name: _student(tokenizer, corpus, lessons, seed=seed) for form in forms}
    optimisers = {
        name: torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        for name, model in students.items()
    }
    teacher_head = head_of(teacher, vocab_size=len(tokenizer))
    pace = replace(Sizes(), num_steps=lessons.num_steps, warmup_steps=lessons.warmup_steps)

    # each step: the teacher once, then every student
    for step, batch in enumerate(_batches(corpus, lessons, seed=seed)):
        with torch.no_grad():
            teacher_TV = teacher_head.logits(hidden_at(teacher, batch.tokens))
        step_seed = seed * lessons.num_steps + step
        for form in forms:
            student, optimiser = students[form.name], optimisers[form.name]
            for group in optimiser.param_groups:
                group["lr"] = lessons.learning_rate * learning_rate_share(step, pace)
            loss = _loss(form, teacher_TV, student, batch, step_seed=step_seed)
            (loss / len(batch.tokens.labels_T)).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm=1.0)
            optimiser.step()
            optimiser.zero_grad()
        on_step()
    return {name: student.eval() for name, student in students.items()}


def target_of(
    form: Form, teacher_TV: Tensor, seeds_T: Tensor, *, step_seed: int
) -> CompressedLogits:
    """What is decoded from the form's records."""
    spec = form.spec
    target = compress(teacher_TV, spec, seeds_T=seeds_T)
    if form.kind == "independent":
        assert spec.k == 0
        generator = torch.Generator().manual_seed(step_seed)
        draws_TN = torch.multinomial(
            teacher_TV.softmax(dim=1), spec.num_draws, replacement=True, generator=generator
        )
        target = replace(target, tail_ids_TN=draws_TN.sort(dim=1).values.int())
    return decode(encode(target, spec), spec)


def _loss(
    form: Form, teacher_TV: Tensor, student: PreTrainedModel, batch: _Batch, *, step_seed: int
) -> Tensor:
    """The sum over the batch's tokens."""
    hidden_TH = hidden_at(student, batch.tokens)
    head = head_of(student, vocab_size=form.spec.vocab_size)
    sparse = partial(
        distillation_loss, hidden_TH, head, divergence=forward_kl, labels_T=batch.tokens.labels_T
    )
    match form.kind:
        case "text":
            return sparse(None, ce_weight=1.0, divergence_weight=0.0).total
        case "everything":
            return _dense(hidden_TH, head, teacher_TV)
        case "weighted":
            return _weighted(form, hidden_TH, head, teacher_TV, step_seed=step_seed)
        case "peer":
            assert form.peer is not None
            return form.peer.loss(teacher_TV, hidden_TH, head, batch.tokens.labels_T)
        case "stored" | "independent":
            target = target_of(form, teacher_TV, batch.seeds_T, step_seed=step_seed)
            return sparse(target, ce_weight=form.ce_weight).total


def _dense(hidden_TH: Tensor, head: Head, teacher_TV: Tensor) -> Tensor:
    p_TV, q_TV = (
        functional.log_softmax(logits_TV, dim=-1)
        for logits_TV in (teacher_TV, head.logits(hidden_TH))
    )
    return functional.kl_div(q_TV, p_TV, reduction="sum", log_target=True)


def _weighted(
    form: Form, hidden_TH: Tensor, head: Head, teacher_TV: Tensor, *, step_seed: int
) -> Tensor:
    """Cross-entropy to independent draws from the proposal, each with its importance weight: the
    teacher's probability over the proposal's. Weights are not rounded."""
    logp_TV, logr_TV = (
        functional.log_softmax(power * teacher_TV, dim=-1) for power in (1.0, form.proposal)
    )
    generator = torch.Generator().manual_seed(step_seed)
    draws_TN = torch.multinomial(
        logr_TV.exp(), form.spec.num_draws, replacement=True, generator=generator
    )
    weights_TN = (logp_TV - logr_TV).gather(1, draws_TN).exp() / form.spec.num_draws
    logq_TN = functional.log_softmax(head.logits(hidden_TH), dim=-1).gather(1, draws_TN)
    return -(weights_TN * logq_TN).sum()


def _student(
    tokenizer: PreTrainedTokenizerFast, corpus: Corpus, lessons: Lessons, *, seed: int
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = llama_config(lessons.shape, tokenizer, corpus.sequence_length)
        student = LlamaForCausalLM(config)
        student.train()
        return student


def _batches(corpus: Corpus, lessons: Lessons, *, seed: int) -> Iterator[_Batch]:
    """Batches of the corpus's sequences, shuffled by seed, again from the first where they run out.
    A sequence has the same draws each time."""
    size, random = lessons.batch_sequences, np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(lessons.num_steps):
        if len(order) < size:
            order += random.permutation(corpus.num_sequences).tolist()
        sequences, order = order[:size], order[size:]
        yield _batch(corpus, sequences, seed=seed)


def _batch(corpus: Corpus, sequences: list[int], *, seed: int) -> _Batch:
    tokens = TokenBatch.of(joined([corpus.rows(sequence, sequence + 1) for sequence in sequences]))
    places_T, length = tokens.target_positions_T, corpus.sequence_length
    sequences_T = torch.tensor(sequences)[places_T // length]
    return _Batch(tokens, seeds_T=token_seeds(seed, sequences_T, places_T % length))
