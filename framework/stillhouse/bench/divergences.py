"""`stillhouse bench divergences`: what each divergence learns from each form of target, at equal
bytes.

The language is exact and its student small (`language`); compression, records and the fused loss
are the real ones. The dense gain of a divergence is how far its own value falls when a student
learns from the whole distribution: below its first value where forward KL has trained the student
before (`warm`), and below what the text alone reaches where it begins with random weights (`far`,
and `schedule`, whose first third of steps is forward KL). A form's figure is the share of that
gain.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
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
from stillhouse.bench.provenance import Provenance
from stillhouse.logits import TargetSpec, compress, decode, encode, token_seeds
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
REAL_VOCAB = 151_936
_ENTRIES = 8

Start = Literal["warm", "schedule", "far"]
STARTS: tuple[Start, ...] = ("warm", "schedule", "far")
TOP8_MASSES = {"flat": 0.5, "sharp": 0.85}


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured, and how a student is trained."""

    num_seeds: int
    num_steps: int
    batch_tokens: int = 256
    num_contexts: int = 256
    learning_rate: float = 0.03


Form = TargetSpec | Literal["text", "everything"]


def forms_of(vocab_size: int) -> dict[str, Form]:
    """The two bounds, then the forms that a record of BUDGET bytes affords at REAL_VOCAB."""

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
    }


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one student learns, from where."""

    name: str  # of the divergence
    start: Start
    form_name: str
    form: Form

    def divergence_at(self, share_done: float) -> Divergence:
        """The divergence after a share of the steps."""
        if self.start == "schedule" and share_done < 1 / 3:
            return forward_kl
        return divergence_named(self.name, DIVERGENCES[self.name])


def learn(
    language: Language, student: LanguageStudent, lesson: Lesson, effort: Effort, *, seed: int
) -> float:
    """Train the student in place; returns the share of its steps that were clipped.

    All lessons of a seed read the same contexts and labels.
    """
    random = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(student.parameters(), betas=(0.9, 0.95))
    peak = effort.learning_rate / (3.0 if lesson.start == "warm" else 1.0)
    num_clipped = 0
    for step in range(effort.num_steps):
        done = step / effort.num_steps
        warmed = min(1.0, (step + 1) / 10)
        optimiser.param_groups[0]["lr"] = peak * warmed * 0.5 * (1 + math.cos(math.pi * done))
        contexts_T = torch.randint(effort.num_contexts, (effort.batch_tokens,), generator=random)
        logp_TV = language.logp_CV[contexts_T]
        labels_T = logp_TV.exp().multinomial(1, generator=random)[:, 0]
        seeds_T = token_seeds(seed, torch.full_like(contexts_T, step), torch.arange(len(logp_TV)))
        loss = _loss(lesson, logp_TV, student, contexts_T, labels_T, seeds_T, done=done)
        (loss / len(logp_TV)).backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm=1.0)
        num_clipped += bool(norm > 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return num_clipped / effort.num_steps


def _loss(
    lesson: Lesson,
    logp_TV: Tensor,
    student: LanguageStudent,
    contexts_T: Tensor,
    labels_T: Tensor,
    seeds_T: Tensor,
    *,
    done: float,
) -> Tensor:
    """The sum over the batch's tokens."""
    # the bounds
    divergence = lesson.divergence_at(done)
    if lesson.form == "everything":
        return divergence.of(logp_TV, student.logq(contexts_T)).sum()
    hidden_TH = student.hidden_CH[contexts_T]
    if lesson.form == "text":
        return distillation_loss(
            hidden_TH,
            student.head,
            None,
            divergence=divergence,
            labels_T=labels_T,
            ce_weight=1.0,
            divergence_weight=0.0,
        ).total
    # a record
    spec = lesson.form
    target = decode(encode(compress(logp_TV, spec, seeds_T=seeds_T), spec), spec)
    return distillation_loss(hidden_TH, student.head, target, divergence=divergence).total


@dataclass(frozen=True, slots=True)
class Result:
    """One student of one lesson."""

    teacher: str  # flat or sharp
    seed: int
    start: Start
    divergence: str
    form: str
    share_clipped: float  # of the steps
    scores: LanguageScores
    share_of_gain: float  # 1: as much as the whole distribution; 0: nothing


def bench_divergences(
    vocab_size: int, effort: Effort, *, threads: int, command: str, out: Path | None
) -> None:
    """Measure, print the tables, and write all that was measured to `out`, after each language."""
    torch.set_num_threads(threads)
    console, provenance, results = terminal(), Provenance.of(command), list[Result]()
    for teacher, top8_mass in TOP8_MASSES.items():
        for seed in range(effort.num_seeds):
            with Progress(console=console, disable=not console.is_terminal) as bar:
                task = bar.add_task(f"{teacher}, seed {seed}", total=_num_lessons(vocab_size))
                for result in measured(teacher, top8_mass, vocab_size, effort, seed=seed):
                    results.append(result)
                    bar.advance(task)
            write_record(
                out,
                "divergences",
                provenance,
                vocab_size=vocab_size,
                effort=asdict(effort),
                results=[asdict(result) for result in results],
            )
    for start in STARTS:
        console.print(table(results, start))


def measured(
    teacher: str, top8_mass: float, vocab_size: int, effort: Effort, *, seed: int
) -> Iterator[Result]:
    """The students of one language. All of them begin with the same weights, but for those of
    `warm`, which forward KL on the whole distribution has trained before."""
    language = Language.of(
        num_contexts=effort.num_contexts,
        vocab_size=vocab_size,
        top8_mass=top8_mass,
        seed=1_000 + seed,
    )
    fresh = LanguageStudent(language, seed=seed)
    warm = deepcopy(fresh)
    before = Lesson("forward_kl", "far", "everything", "everything")
    learn(language, warm, before, effort, seed=10_000 + seed)

    # a divergence's students from one start, then their places between the bounds
    for start, name in product(STARTS, DIVERGENCES):
        divergence = divergence_named(name, DIVERGENCES[name])
        first = warm if start == "warm" else fresh
        found: dict[str, tuple[float, LanguageScores]] = {}
        for lesson in _lessons(name, start, vocab_size):
            student = deepcopy(first)
            clipped = learn(language, student, lesson, effort, seed=seed)
            found[lesson.form_name] = clipped, language_scores(language, student, divergence)
        if not found:
            continue
        best, worst = (found[bound][1].divergence for bound in ("everything", "text"))
        if start == "warm":
            worst = language_scores(language, first, divergence).divergence
        for form_name, (clipped, scores) in found.items():
            share = (worst - scores.divergence) / (worst - best)
            yield Result(teacher, seed, start, name, form_name, clipped, scores, share)


def _lessons(name: str, start: Start, vocab_size: int) -> list[Lesson]:
    """Every form from which this divergence can differ: forward KL needs no schedule, and blind
    draws serve it alone."""
    if start == "schedule" and name == "forward_kl":
        return []
    return [
        Lesson(name, start, form_name, form)
        for form_name, form in forms_of(vocab_size).items()
        if not (_is_blind(form) and name != "forward_kl")
    ]


def _num_lessons(vocab_size: int) -> int:
    return sum(len(_lessons(*at, vocab_size)) for at in product(DIVERGENCES, STARTS))


def _is_blind(form: Form) -> bool:
    return isinstance(form, TargetSpec) and form.num_draws > 0 and not form.weighted


def table(results: Sequence[Result], start: Start) -> Table:
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
                    100 * result.share_of_gain
                    for result in here
                    if (result.divergence, result.teacher, result.form) == (name, teacher, form)
                ]
                cells.append(shown(Spread.of(shares), ".0f") if shares else "")
            if any(cells):
                found.add_row(name, teacher, *cells)
    return found
