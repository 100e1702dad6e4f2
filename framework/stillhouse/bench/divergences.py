"""`stillhouse bench divergences`: what each divergence learns from each form of target, at equal
bytes.

The language is exact and its student small (`language`); compression, records and the fused loss
are the real ones. The dense gain of a divergence is how far its own value falls when a student
learns from the whole distribution: below its first value where forward KL has trained the student
before (`warm`), and below what the text alone reaches where it begins with random weights (`far`,
and `schedule`, whose first third of steps is forward KL). A form's figure is the share of that
gain. There is none where the whole distribution itself takes a student no nearer than the text.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from stillhouse.bench.figures import Spread
from stillhouse.bench.language import (
    Language,
    LanguageScores,
    LanguageStudent,
    language_scores,
)
from stillhouse.bench.output import figures_table, shown, terminal, write_record
from stillhouse.bench.peers import REAL_VOCAB, Peer
from stillhouse.bench.provenance import Provenance
from stillhouse.errors import ConfigError
from stillhouse.logits import CompressedLogits, TargetSpec, compress, decode, encode, token_seeds
from stillhouse.losses.distillation import distillation_loss
from stillhouse.losses.divergences import Divergence, divergence_named, forward_kl

DIVERGENCES = {
    "forward_kl": 0.5,
    "reverse_kl": 0.5,
    "jsd": 0.5,
    "tvd": 0.5,
    "skew_forward_kl": 0.1,
    "skew_reverse_kl": 0.1,
}  # with the mix of each
BUDGET = 100  # bytes a record, at the vocabulary of REAL_VOCAB
_ENTRIES = 8

STARTS = ("warm", "schedule", "far")
TOP8_MASSES = {"flat": 0.5, "sharp": 0.85}


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured, and how a student is trained."""

    num_seeds: int
    num_steps: int
    batch_tokens: int = 256
    num_contexts: int = 256
    learning_rate: float = 0.03
    first_seed: int = 0  # of num_seeds


@dataclass(frozen=True, slots=True)
class Scope:
    """Which of all pairings are measured."""

    teachers: tuple[str, ...] = tuple(TOP8_MASSES)
    starts: tuple[str, ...] = STARTS
    divergences: tuple[str, ...] = tuple(DIVERGENCES)

    def check(self) -> None:
        """Raises ConfigError where it names something that there is not."""
        for given, known in (
            (self.teachers, TOP8_MASSES),
            (self.starts, STARTS),
            (self.divergences, DIVERGENCES),
        ):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ConfigError(f"there is no {unknown[0]!r}; wanted one of {', '.join(known)}")


Form = TargetSpec | Peer | Literal["text", "everything"]


def forms_of(vocab_size: int, peers: Sequence[Peer] = ()) -> dict[str, Form]:
    """The two bounds, the forms that a record of BUDGET bytes affords at REAL_VOCAB, and those of
    other projects."""

    def affordable(**fields: bool) -> int:
        """The most draws beside the entries."""
        return max(
            num
            for num in range(1, 8 * BUDGET)
            if TargetSpec(REAL_VOCAB, _ENTRIES, num_draws=num, **fields).bytes_per_token <= BUDGET
        )

    entries = max(
        k for k in range(1, 8 * BUDGET) if TargetSpec(REAL_VOCAB, k).bytes_per_token <= BUDGET
    )
    blind, weighted = affordable(), affordable(weighted=True)
    return {
        "text": "text",
        "everything": "everything",
        f"{_ENTRIES} + tail": TargetSpec(vocab_size, _ENTRIES),
        f"{entries} + tail": TargetSpec(vocab_size, entries),
        f"{_ENTRIES} + {blind} draws": TargetSpec(vocab_size, _ENTRIES, num_draws=blind),
        f"{_ENTRIES} + {weighted} weighted": TargetSpec(
            vocab_size, _ENTRIES, num_draws=weighted, weighted=True
        ),
        **{peer.name: peer for peer in peers},
    }


def bytes_of(form: Form) -> int | None:
    """Of a token at REAL_VOCAB; None for the bounds."""
    match form:
        case TargetSpec():
            return replace(form, vocab_size=REAL_VOCAB).bytes_per_token
        case Peer():
            return form.num_bytes(REAL_VOCAB)
    return None


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one student learns, from where."""

    name: str  # of the divergence
    start: str
    form_name: str
    form: Form

    def divergence_at(self, share_done: float) -> Divergence:
        """The divergence after a share of the steps."""
        if self.start == "schedule" and share_done < 1 / 3:
            return forward_kl
        return divergence_named(self.name, DIVERGENCES[self.name])


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step reads."""

    contexts_T: Tensor
    labels_T: Tensor
    seeds_T: Tensor  # of the draws


def batches_of(language: Language, effort: Effort, *, seed: int) -> list[Batch]:
    """A batch for each step. All lessons of a seed read the same ones."""
    random, batches = torch.Generator().manual_seed(seed), []
    for step in range(effort.num_steps):
        contexts_T = torch.randint(effort.num_contexts, (effort.batch_tokens,), generator=random)
        labels_T = language.logp_CV[contexts_T].exp().multinomial(1, generator=random)[:, 0]
        places_T = torch.arange(effort.batch_tokens)
        seeds_T = token_seeds(seed, torch.full_like(contexts_T, step), places_T)
        batches.append(Batch(contexts_T, labels_T, seeds_T))
    return batches


def targets_of(
    language: Language, batches: Sequence[Batch], form: Form
) -> Sequence[CompressedLogits | None]:
    """What is decoded from the records of each batch; None where the form has no records."""
    if not isinstance(form, TargetSpec):
        return [None] * len(batches)
    records = (
        encode(compress(language.logp_CV[batch.contexts_T], form, seeds_T=batch.seeds_T), form)
        for batch in batches
    )
    return [decode(record, form) for record in records]


def learn(
    student: LanguageStudent,
    lesson: Lesson,
    *,
    language: Language,
    effort: Effort,
    batches: Sequence[Batch],
    targets: Sequence[CompressedLogits | None],
) -> float:
    """Train the student in place; returns the share of its steps that were clipped."""
    optimiser = torch.optim.Adam(student.parameters(), betas=(0.9, 0.95))
    peak = effort.learning_rate / (3.0 if lesson.start == "warm" else 1.0)
    num_clipped = 0
    for step, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        done = step / effort.num_steps
        warmed = min(1.0, (step + 1) / 10)
        optimiser.param_groups[0]["lr"] = peak * warmed * 0.5 * (1 + math.cos(math.pi * done))
        divergence = lesson.divergence_at(done)
        loss = _loss(student, lesson.form, language, batch, target, divergence=divergence)
        (loss / effort.batch_tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm=1.0)
        num_clipped += bool(norm > 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return num_clipped / effort.num_steps


def _loss(
    student: LanguageStudent,
    form: Form,
    language: Language,
    batch: Batch,
    target: CompressedLogits | None,
    *,
    divergence: Divergence,
) -> Tensor:
    """The sum over the batch's tokens."""
    # of the whole distribution, and of another project
    hidden_TH = student.hidden_CH[batch.contexts_T]
    logp_TV = language.logp_CV[batch.contexts_T]
    if form == "everything":
        return divergence.of(logp_TV, student.logq(batch.contexts_T)).sum()
    if isinstance(form, Peer):
        return form.loss(logp_TV, hidden_TH, student.head, batch.labels_T)
    # of the text, and of a record
    text_weight = 1.0 if form == "text" else 0.0
    return distillation_loss(
        hidden_TH,
        student.head,
        target,
        divergence=divergence,
        labels_T=batch.labels_T,
        ce_weight=text_weight,
        divergence_weight=1.0 - text_weight,
    ).total


@dataclass(frozen=True, slots=True)
class Result:
    """One student of one lesson."""

    teacher: str  # flat or sharp
    seed: int
    start: str
    divergence: str
    form: str
    share_clipped: float  # of the steps
    scores: LanguageScores
    # 1: as much as the whole distribution; 0: nothing; None where that itself gains nothing
    share_of_gain: float | None


def bench_divergences(
    vocab_size: int,
    effort: Effort,
    scope: Scope,
    *,
    peers_at: Callable[[int], Sequence[Peer]],
    threads: int,
    command: str,
    out: Path | None,
) -> None:
    """Measure, print the tables, and write all that was measured to `out`, after each language.
    `peers_at`: the targets of other projects at a vocabulary, each with a forward KL of its own.
    Raises ConfigError where `scope` names something that there is not."""
    scope.check()
    torch.set_num_threads(threads)
    forms = forms_of(vocab_size, peers_at(vocab_size))
    console, provenance, results = terminal(), Provenance.of(command), list[Result]()

    # written after each language, so that an interruption loses one at most
    seeds = range(effort.first_seed, effort.first_seed + effort.num_seeds)
    for teacher, seed in product(scope.teachers, seeds):
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"{teacher}, seed {seed}", total=_num_lessons(forms, scope))
            for result in measured(
                teacher, forms, vocab_size=vocab_size, effort=effort, scope=scope, seed=seed
            ):
                results.append(result)
                bar.advance(task)
        write_record(
            out,
            "divergences",
            provenance,
            vocab_size=vocab_size,
            effort=asdict(effort),
            scope=asdict(scope),
            bytes_at_real_vocab={name: bytes_of(form) for name, form in forms.items()},
            results=[asdict(result) for result in results],
        )

    # the same in words
    for start in scope.starts:
        console.print(table(results, start))


def measured(
    teacher: str,
    forms: Mapping[str, Form],
    *,
    vocab_size: int,
    effort: Effort,
    scope: Scope,
    seed: int,
) -> Iterator[Result]:
    """The students of one language. All of them begin with the same weights, but for those of
    `warm`, which forward KL on the whole distribution has trained before."""
    language = Language.of(
        num_contexts=effort.num_contexts,
        vocab_size=vocab_size,
        top8_mass=TOP8_MASSES[teacher],
        seed=1_000 + seed,
    )
    fresh = LanguageStudent(language, seed=seed)
    warm = deepcopy(fresh)
    before = Lesson("forward_kl", "far", "everything", "everything")
    earlier = batches_of(language, effort, seed=10_000 + seed)
    course = partial(learn, language=language, effort=effort)
    course(warm, before, batches=earlier, targets=[None] * len(earlier))
    batches = batches_of(language, effort, seed=seed)
    targets = {name: targets_of(language, batches, form) for name, form in forms.items()}

    # a divergence's students from one start, then their places between the bounds
    for start, name in product(scope.starts, scope.divergences):
        divergence = divergence_named(name, DIVERGENCES[name])
        first = warm if start == "warm" else fresh
        found: dict[str, tuple[float, LanguageScores]] = {}
        for lesson in _lessons(name, start, forms):
            student = deepcopy(first)
            here = targets[lesson.form_name]
            clipped = course(student, lesson, batches=batches, targets=here)
            found[lesson.form_name] = clipped, language_scores(language, student, divergence)
        if not found:
            continue
        best, worst = (found[bound][1].divergence for bound in ("everything", "text"))
        if start == "warm":
            worst = language_scores(language, first, divergence).divergence
        for form_name, (clipped, scores) in found.items():
            share = (worst - scores.divergence) / (worst - best) if best < worst else None
            yield Result(teacher, seed, start, name, form_name, clipped, scores, share)


def _lessons(name: str, start: str, forms: Mapping[str, Form]) -> list[Lesson]:
    """Every form from which this divergence can differ: forward KL needs no schedule, and blind
    draws and other projects' targets serve it alone."""
    if start == "schedule" and name == "forward_kl":
        return []
    return [
        Lesson(name, start, form_name, form)
        for form_name, form in forms.items()
        if name == "forward_kl" or not (_is_blind(form) or isinstance(form, Peer))
    ]


def _num_lessons(forms: Mapping[str, Form], scope: Scope) -> int:
    return sum(len(_lessons(*at, forms)) for at in product(scope.divergences, scope.starts))


def _is_blind(form: Form) -> bool:
    return isinstance(form, TargetSpec) and form.num_draws > 0 and not form.weighted


def table(results: Sequence[Result], start: str) -> Table:
    """The share of the dense gain by divergence and form: the median of the seeds, and from least
    to most."""
    here = [result for result in results if result.start == start]
    forms = [form for form in dict.fromkeys(result.form for result in here) if form != "everything"]
    found = figures_table(f"{start}: share of the dense gain, %", ["divergence", "teacher", *forms])
    for name in DIVERGENCES:
        for teacher in TOP8_MASSES:
            cells = []
            for form in forms:
                shares = [
                    result.share_of_gain
                    for result in here
                    if (result.divergence, result.teacher, result.form) == (name, teacher, form)
                ]
                gained = [100 * share for share in shares if share is not None]
                nothing = "no gain" if shares else ""
                cells.append(shown(Spread.of(gained), ".0f") if gained else nothing)
            if any(cells):
                found.add_row(name, teacher, *cells)
    return found
