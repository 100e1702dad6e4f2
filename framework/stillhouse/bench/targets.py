"""`stillhouse bench targets`: which form of a target teaches best for its bytes.

Budgets of bytes a record are split between exact entries (K) and draws from the tail (N), and set
between two bounds: the text alone, and the teacher's whole distribution. Every student of a seed
has the same weights at first and reads the same sequences.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stillhouse.atomic import whole_directory
from stillhouse.bench.classroom import Form, Lessons, teach
from stillhouse.bench.coding import Coding, coding_table, codings_of
from stillhouse.bench.figures import Spread
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.trained import DEMO_TEACHER
from stillhouse.cluster.processes import Secrets
from stillhouse.config import EvaluateSection, ModelSection, TeacherSection
from stillhouse.errors import ConfigError
from stillhouse.evaluation.scores import EvaluationJob, Scores, evaluate
from stillhouse.logits import TargetSpec
from stillhouse.models import load_model, load_tokenizer, tokenizer_digest, vocab_size_of
from stillhouse.pipeline.toy import Sizes, demo_config, make_models
from stillhouse.sequences import Split, prepare_corpus

BUDGETS = (24, 48, 128)  # bytes a record
_PROPOSALS = (0.8, 1.25)  # powers of the teacher's distribution
_BESIDE_TEXT = 48  # the budget of which two forms are tried beside the text too
SHARES = (0.5, 0.25, 0.0)  # exact entries, of as many as a budget affords without draws


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    num_steps: int
    num_seeds: int
    batch_sequences: int
    heldout_sequences: int
    teacher_steps: int  # where there is no teacher yet


QUICK = Effort(num_steps=20, num_seeds=1, batch_sequences=4, heldout_sequences=8, teacher_steps=40)


def thorough(*, num_steps: int, num_seeds: int) -> Effort:
    """As much as the findings need."""
    return Effort(
        num_steps,
        num_seeds,
        batch_sequences=8,
        heldout_sequences=256,
        teacher_steps=Sizes().num_steps,
    )


def bench_targets(
    work_dir: Path,
    teacher_dir: Path | None,
    *,
    effort: Effort,
    threads: int,
    cache_dir: Path,
    command: str,
    out: Path | None,
) -> None:
    """Measure, print the tables, and write all that was measured to `out` and a figure beside it. A
    teacher is made where none is given.

    Raises ConfigError where `teacher_dir` holds no model.
    """
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(threads)
    provenance = Provenance.of(command)
    if teacher_dir is None:
        teacher_dir = (
            DEMO_TEACHER if DEMO_TEACHER.exists() else _made(work_dir, effort, cache_dir, console)
        )
    if not (teacher_dir / "config.json").is_file():
        raise ConfigError(
            f"there is no model in {teacher_dir}; name the directory of a teacher, or leave "
            "--teacher out to have one made"
        )
    section = TeacherSection(model=str(teacher_dir), dtype="float32", device="cpu")
    teacher, tokenizer = load_model(section), load_tokenizer(section.model)
    corpus = demo_config(work_dir).corpus.model_copy(
        update={"heldout_sequences": effort.heldout_sequences}
    )
    split = prepare_corpus(
        corpus, tokenizer, tokenizer_digest=tokenizer_digest(tokenizer), cache_dir=cache_dir
    )
    forms = forms_of(vocab_size_of(tokenizer))
    lessons = Lessons(
        effort.num_steps,
        effort.batch_sequences,
        Sizes().student,
        learning_rate=2e-3,
        warmup_steps=20,
    )
    codings = codings_of(teacher, split.heldout, vocab_size_of(tokenizer))
    rounds: list[Mapping[str, Scores]] = []
    for seed in range(effort.num_seeds):
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"seed {seed}, {len(forms)} students", total=effort.num_steps)
            advance = partial(bar.advance, task)
            students = teach(
                forms, teacher, tokenizer, split.train, lessons, seed=seed, on_step=advance
            )
        for name, student in students.items():
            student.save_pretrained(work_dir / "students" / name)
        rounds.append(
            {
                name: _scores(work_dir / "students" / name, section, split, threads)
                for name in students
            }
        )
        kls = (f"{name} {scores.kl:.3f}" for name, scores in rounds[-1].items())
        console.print(f"seed {seed}, KL from the teacher: {', '.join(kls)}")
        if out is not None:  # before the next seed begins
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(
                json.dumps(record(provenance, effort, lessons, forms, rounds, codings), indent=2)
                + "\n"
            )
            figure(forms, rounds).savefig(out.with_suffix(".svg"))
    console.print(table(forms, rounds))
    console.print(coding_table(codings))


def forms_of(vocab_size: int) -> list[Form]:
    """The two bounds, then every split of every budget, and the independent draws of RS-KD; of one
    budget two splits beside the text."""
    whole = TargetSpec(vocab_size, vocab_size)
    forms = [Form("text", "text", whole), Form("everything", "everything", whole)]
    for budget in BUDGETS:
        most = _most(lambda k: TargetSpec(vocab_size, k).bytes_per_token, budget)
        bucket = TargetSpec(vocab_size, most)
        splits = [
            spec_within(budget, vocab_size, k)
            for k in dict.fromkeys(round(share * most) for share in SHARES)
        ]
        forms += [Form(f"{spec.k}+{spec.num_draws}", "stored", spec) for spec in (bucket, *splits)]
        forms.append(Form(f"rs-{splits[-1].num_draws}", "independent", splits[-1]))
        if budget == _BESIDE_TEXT:
            forms += [
                Form(f"{spec.k}+{spec.num_draws}+text", "stored", spec, ce_weight=1.0)
                for spec in (bucket, splits[0])
            ]
            weighted = TargetSpec(
                vocab_size,
                0,
                num_draws=_most(
                    lambda n: TargetSpec(vocab_size, 0, num_draws=n).bytes_per_token + n, budget
                ),
            )
            forms += [
                Form(f"rs-{weighted.num_draws}^{power}", "weighted", weighted, proposal=power)
                for power in _PROPOSALS
            ]
    return forms


def spec_within(budget: int, vocab_size: int, k: int) -> TargetSpec:
    """k exact entries, and as many draws as a record of `budget` bytes has room for beside them."""
    return TargetSpec(
        vocab_size,
        k,
        num_draws=_most(
            lambda num_draws: TargetSpec(vocab_size, k, num_draws=num_draws).bytes_per_token, budget
        ),
    )


def share_of_the_gap(scores: Mapping[str, Scores], name: str) -> float:
    """How much of the way from the text alone (0) to the whole distribution (1) a student came, in
    KL from the teacher."""
    worst, best = scores["text"].kl, scores["everything"].kl
    return (worst - scores[name].kl) / (worst - best)


def record(
    provenance: Provenance,
    effort: Effort,
    lessons: Lessons,
    forms: Sequence[Form],
    rounds: Sequence[Mapping[str, Scores]],
    codings: Sequence[Coding],
) -> dict[str, object]:
    """All that was measured and all that it depends on, as plain values."""
    return {
        "benchmark": "targets",
        "provenance": asdict(provenance),
        "effort": asdict(effort),
        "lessons": asdict(lessons),
        "forms": [asdict(form) | {"bytes_per_token": form.bytes_per_token} for form in forms],
        "rounds": [{name: asdict(scores) for name, scores in one.items()} for one in rounds],
        "share_of_the_gap": {
            form.name: asdict(Spread.of(share_of_the_gap(one, form.name) for one in rounds))
            for form in forms
        },
        "coding": [asdict(one) for one in codings],
    }


def table(forms: Sequence[Form], rounds: Sequence[Mapping[str, Scores]]) -> Table:
    """What a person wants to know: medians over the seeds, and for the share of the gap the least
    and the most."""
    found = Table(
        title=f"What a student learns from, {len(rounds)} seeds: held-out medians",
        box=box.SIMPLE,
        padding=0,
    )
    found.add_column("target", no_wrap=True)
    for heading in ("bytes", "loss", "KL", "of the gap, %", "top-1", "accepted", "ECE"):
        found.add_column(heading, justify="right", no_wrap=True)
    for form in forms:
        spread = {
            field.name: Spread.of(getattr(one[form.name], field.name) for one in rounds).median
            for field in fields(Scores)
        }
        gap = Spread.of(share_of_the_gap(one, form.name) for one in rounds)
        found.add_row(
            _in_words(form),
            "" if form.bytes_per_token is None else str(form.bytes_per_token),
            f"{spread['cross_entropy']:.3f}",
            f"{spread['kl']:.3f}",
            f"{100 * gap.median:.0f} ({100 * gap.least:.0f}..{100 * gap.most:.0f})",
            f"{spread['agreement']:.1%}",
            f"{spread['acceptance']:.3f}",
            f"{spread['calibration_error']:.3f}",
        )
    return found


def figure(forms: Sequence[Form], rounds: Sequence[Mapping[str, Scores]]) -> Figure:
    """KL from the teacher over the split of each budget, between the two bounds."""
    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()

    def spread(form: Form) -> Spread:
        return Spread.of(one[form.name].kl for one in rounds)

    text, everything, *others = forms
    axes.axhline(
        spread(everything).median,
        color="0.5",
        linestyle="--",
        linewidth=1,
        label=_in_words(everything),
    )
    axes.axhline(
        spread(text).median, color="0.5", linestyle=":", linewidth=1, label=_in_words(text)
    )
    for budget in BUDGETS:
        within = [
            form
            for form in others
            if min(each for each in BUDGETS if form.spec.bytes_per_token <= each) == budget
        ]
        split = [form for form in within if form.kind == "stored" and form.ce_weight == 0.0]
        kls = [spread(form) for form in split]
        bars = [[kl.median - kl.least for kl in kls], [kl.most - kl.median for kl in kls]]
        (line, *_) = axes.errorbar(
            [form.spec.k for form in split],
            [kl.median for kl in kls],
            yerr=bars,
            marker="o",
            label=f"{budget} bytes",
        )
        for form in (form for form in within if form.kind == "independent"):
            label = f"{budget} bytes, independent draws"
            axes.plot(
                [0],
                [spread(form).median],
                marker="x",
                linestyle="",
                color=line.get_color(),
                label=label,
            )
    axes.set_xlabel("exact entries; the rest of the bytes are draws from the tail")
    axes.set_ylabel("held-out KL from the teacher, nats")
    axes.legend(frameon=False, fontsize=8)
    return drawn


def _in_words(form: Form) -> str:
    match form.kind:
        case "text":
            return "the text alone"
        case "everything":
            return "the whole distribution"
        case "independent":
            return f"{form.spec.num_draws} independent (RS-KD)"
        case "weighted":
            return f"{form.spec.num_draws} weighted, p^{form.proposal}"
        case "stored":
            tail = f"{form.spec.num_draws} draws" if form.spec.num_draws else "tail"
            return (f"{form.spec.k} + {tail}" if form.spec.k else tail) + (
                " + text" if form.ce_weight else ""
            )


def _most(size: Callable[[int], int], budget: int) -> int:
    """The greatest number of which `size` bytes are within the budget; an id takes more than a
    bit."""
    return max((number for number in range(1, 8 * budget) if size(number) <= budget), default=0)


def _made(work_dir: Path, effort: Effort, cache_dir: Path, console: Console) -> Path:
    """The demo's teacher, made in the working directory unless it is there."""
    folder = work_dir / f"models-{effort.teacher_steps}"
    if not folder.exists():
        sizes = replace(Sizes(), num_steps=effort.teacher_steps)
        with whole_directory(folder) as draft:
            make_models(
                draft, demo_config(work_dir).corpus, sizes, cache_dir=cache_dir, console=console
            )
    return folder / "teacher"


def _scores(folder: Path, teacher: TeacherSection, split: Split, threads: int) -> Scores:
    job = EvaluationJob(
        teacher=teacher,
        models={"student": ModelSection(model=str(folder), dtype="float32", device="cpu")},
        vocab_size=vocab_size_of(load_tokenizer(teacher.model)),
        section=EvaluateSection(),
        device="cpu",
        threads=threads,
        secrets=Secrets(None),
    )
    return evaluate(job, split.heldout.rows(0, split.heldout.num_sequences))["student"]
