"""`stillhouse bench targets`: which form of a target teaches best for its bytes.

A comparison is a list of forms, the first two of which are its bounds: the text alone, and the
teacher's whole distribution. `SPLITS` divides budgets of bytes a record between exact entries (K)
and draws from the tail (N); `beside_peers` has the other comparison. Every student of a seed has
the same weights at first and reads the same sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stillhouse.atomic import whole_directory
from stillhouse.bench.classroom import Form, Lessons, teach
from stillhouse.bench.coding import Coding, coding_table, codings_of
from stillhouse.bench.figures import Spread
from stillhouse.bench.output import figures_table, terminal, write_record
from stillhouse.bench.peers import REAL_VOCAB
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.trained import DEMO_TEACHER
from stillhouse.cluster.processes import Secrets
from stillhouse.config import EvaluateSection, ModelSection, TeacherSection
from stillhouse.errors import ConfigError
from stillhouse.evaluation.scores import EvaluationJob, evaluate
from stillhouse.logits import TargetSpec
from stillhouse.losses.score import Scores
from stillhouse.models.load import load_model
from stillhouse.models.tokenizers import load_tokenizer, tokenizer_digest, vocab_size_of
from stillhouse.pipeline.toy import Sizes, demo_config, make_models
from stillhouse.sequences.packing import Split, prepare_corpus

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


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared: the forms at a vocabulary, the text and the whole distribution first, and
    the figure of their scores, a mapping by name for each seed."""

    forms: Callable[[int], list[Form]]
    figure: Callable[[Sequence[Form], Sequence[Mapping[str, Scores]]], Figure]


def bench_targets(
    work_dir: Path,
    teacher_dir: Path | None,
    comparison: Comparison,
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
    # the teacher, the text and what students may learn from
    console = terminal()
    torch.set_num_threads(threads)
    provenance = Provenance.of(command)
    section = _teacher(work_dir, teacher_dir, effort, cache_dir, console)
    teacher, tokenizer = load_model(section), load_tokenizer(section.model)
    corpus = demo_config(work_dir).corpus.model_copy(
        update={"heldout_sequences": effort.heldout_sequences}
    )
    digest, vocab_size = tokenizer_digest(tokenizer), vocab_size_of(tokenizer)
    split = prepare_corpus(corpus, tokenizer, tokenizer_digest=digest, cache_dir=cache_dir)
    forms = comparison.forms(vocab_size)
    lessons = _lessons(effort)
    codings = codings_of(teacher, split.heldout, vocab_size)

    # the students of each seed
    rounds: list[Mapping[str, Scores]] = []
    for seed in range(effort.num_seeds):
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"seed {seed}, {len(forms)} students", total=effort.num_steps)
            students = teach(
                forms,
                teacher,
                tokenizer,
                split.train,
                lessons,
                seed=seed,
                on_step=partial(bar.advance, task),
            )
        scores = {}
        for name, student in students.items():
            student.save_pretrained(work_dir / "students" / name)
            scores[name] = _scores(work_dir / "students" / name, section, split, threads)
        rounds.append(scores)
        kls = (f"{name} {each.kl:.3f}" for name, each in scores.items())
        console.print(f"seed {seed}, KL from the teacher: {', '.join(kls)}")

        # written before the next seed begins, so that an interruption loses one seed at most
        values = record_of(effort, lessons, forms, rounds, codings)
        write_record(out, "targets", provenance, **values)
        if out is not None:
            comparison.figure(forms, rounds).savefig(out.with_suffix(".svg"))
    console.print(table(forms, rounds))
    console.print(coding_table(codings))


def _lessons(effort: Effort) -> Lessons:
    sizes = effort.num_steps, effort.batch_sequences, Sizes().student
    return Lessons(*sizes, learning_rate=2e-3, warmup_steps=20)


def forms_of(vocab_size: int) -> list[Form]:
    """The two bounds, then every split of every budget, and the independent draws of RS-KD; of one
    budget two splits beside the text."""
    # the bounds
    whole = TargetSpec(vocab_size, vocab_size)
    forms = [Form("text", "text", whole), Form("everything", "everything", whole)]
    for budget in BUDGETS:
        # exact entries alone, their splits with draws, and draws alone
        bucket, *splits = splits_of(budget, vocab_size)
        for spec in (bucket, *splits):
            forms.append(Form(f"{spec.k}+{spec.num_draws}", "stored", spec))
        forms.append(Form(f"rs-{splits[-1].num_draws}", "independent", splits[-1]))
        if budget != _BESIDE_TEXT:
            continue

        # beside the text, and with weights of a byte a draw
        for spec in (bucket, splits[0]):
            name = f"{spec.k}+{spec.num_draws}+text"
            forms.append(Form(name, "stored", spec, ce_weight=1.0))
        num = _most(lambda n: TargetSpec(vocab_size, 0, num_draws=n).bytes_per_token + n, budget)
        weighted = TargetSpec(vocab_size, 0, num_draws=num)
        for power in _PROPOSALS:
            forms.append(Form(f"rs-{num}^{power}", "weighted", weighted, proposal=power))
    return forms


def splits_of(budget: int, vocab_size: int) -> list[TargetSpec]:
    """Exact entries alone, then a record for each of `SHARES`."""
    most = _most(lambda k: TargetSpec(vocab_size, k).bytes_per_token, budget)
    ks = dict.fromkeys(round(share * most) for share in SHARES)
    return [TargetSpec(vocab_size, most), *(spec_within(budget, vocab_size, k) for k in ks)]


def spec_within(budget: int, vocab_size: int, k: int) -> TargetSpec:
    """k exact entries, and as many draws as a record of `budget` bytes has room for beside them."""
    num_draws = _most(lambda n: TargetSpec(vocab_size, k, num_draws=n).bytes_per_token, budget)
    return TargetSpec(vocab_size, k, num_draws=num_draws)


def share_of_the_gap(scores: Mapping[str, Scores], name: str) -> float:
    """How much of the way from the text alone (0) to the whole distribution (1) a student came, in
    KL from the teacher."""
    worst, best = scores["text"].kl, scores["everything"].kl
    return (worst - scores[name].kl) / (worst - best)


def record_of(
    effort: Effort,
    lessons: Lessons,
    forms: Sequence[Form],
    rounds: Sequence[Mapping[str, Scores]],
    codings: Sequence[Coding],
) -> dict[str, object]:
    """All that was measured and its settings, as plain values."""
    return {
        "effort": asdict(effort),
        "lessons": asdict(lessons),
        "forms": [_plain(form) for form in forms],
        "rounds": [{name: asdict(scores) for name, scores in one.items()} for one in rounds],
        "share_of_the_gap": {
            form.name: asdict(Spread.of(share_of_the_gap(one, form.name) for one in rounds))
            for form in forms
        },
        "coding": [asdict(one) for one in codings],
    }


def _plain(form: Form) -> dict[str, object]:
    return asdict(replace(form, peer=None)) | {
        "peer": form.peer.project if form.peer else None,
        "bytes_per_token": form.bytes_per_token,
        "bytes_at_real_vocab": form.bytes_at(REAL_VOCAB),
    }


def table(forms: Sequence[Form], rounds: Sequence[Mapping[str, Scores]]) -> Table:
    """Medians over the seeds, and for the share of the gap the least and the most."""
    title = f"What a student learns from, {len(rounds)} seeds: held-out medians"
    headings = (
        "bytes",
        f"at {REAL_VOCAB:,}",
        "loss",
        "KL",
        "of the gap, %",
        "top-1",
        "accepted",
        "ECE",
    )
    found = figures_table(title, ["target", *headings])

    # a row for each form
    for form in forms:
        median = {
            field.name: Spread.of(getattr(one[form.name], field.name) for one in rounds).median
            for field in fields(Scores)
        }
        gap = Spread.of(share_of_the_gap(one, form.name) for one in rounds)
        sizes = form.bytes_per_token, form.bytes_at(REAL_VOCAB)
        found.add_row(
            in_words(form),
            *("" if num is None else str(num) for num in sizes),
            f"{median['cross_entropy']:.3f}",
            f"{median['kl']:.3f}",
            f"{100 * gap.median:.0f} ({100 * gap.least:.0f}..{100 * gap.most:.0f})",
            f"{median['agreement']:.1%}",
            f"{median['acceptance']:.3f}",
            f"{median['calibration_error']:.3f}",
        )
    return found


def figure(forms: Sequence[Form], rounds: Sequence[Mapping[str, Scores]]) -> Figure:
    """KL from the teacher over the split of each budget, between the two bounds."""
    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()

    def spread(form: Form) -> Spread:
        return Spread.of(one[form.name].kl for one in rounds)

    # the two bounds
    text, everything, *others = forms
    for form, style in ((everything, "--"), (text, ":")):
        label = in_words(form)
        axes.axhline(spread(form).median, color="0.5", linestyle=style, linewidth=1, label=label)

    # a line for each budget
    for budget in BUDGETS:
        within = [
            form
            for form in others
            if min(each for each in BUDGETS if form.spec.bytes_per_token <= each) == budget
        ]
        split = [form for form in within if form.kind == "stored" and form.ce_weight == 0.0]
        kls = [spread(form) for form in split]
        bars = [[kl.median - kl.least for kl in kls], [kl.most - kl.median for kl in kls]]
        ks, medians = [form.spec.k for form in split], [kl.median for kl in kls]
        (line, *_) = axes.errorbar(ks, medians, yerr=bars, marker="o", label=f"{budget} bytes")
        for form in (form for form in within if form.kind == "independent"):
            label, color = f"{budget} bytes, independent draws", line.get_color()
            kl = spread(form).median
            axes.plot([0], [kl], marker="x", linestyle="", color=color, label=label)
    axes.set_xlabel("exact entries; the rest of the bytes are draws from the tail")
    axes.set_ylabel("held-out KL from the teacher, nats")
    axes.legend(frameon=False, fontsize=8)
    return drawn


SPLITS = Comparison(forms_of, figure)


def in_words(form: Form) -> str:
    """As tables and figures name it."""
    match form.kind:
        case "peer":
            return form.name
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
            record = f"{form.spec.k} + {tail}" if form.spec.k else tail
            return f"{record} + text" if form.ce_weight else record


def _most(size: Callable[[int], int], budget: int) -> int:
    """The greatest number for which `size` is at most `budget` bytes, 0 where there is none. It is
    below 8 * budget, since an id takes more than a bit."""
    return max((number for number in range(1, 8 * budget) if size(number) <= budget), default=0)


def _teacher(
    work_dir: Path, teacher_dir: Path | None, effort: Effort, cache_dir: Path, console: Console
) -> TeacherSection:
    """The teacher that was asked for; else the demo's; else one that is made in `work_dir`, unless
    it is there. Raises ConfigError where the directory holds no model."""
    if teacher_dir is None and DEMO_TEACHER.exists():
        teacher_dir = DEMO_TEACHER
    if teacher_dir is None:
        folder = work_dir / f"models-{effort.teacher_steps}"
        if not folder.exists():
            sizes = replace(Sizes(), num_steps=effort.teacher_steps)
            corpus = demo_config(work_dir).corpus
            with whole_directory(folder) as draft:
                make_models(draft, corpus, sizes, cache_dir=cache_dir, console=console)
        teacher_dir = folder / "teacher"
    if not (teacher_dir / "config.json").is_file():
        raise ConfigError(
            f"there is no model in {teacher_dir}; name the directory of a teacher, or leave "
            "--teacher out to have one made"
        )
    return TeacherSection(model=str(teacher_dir), dtype="float32", device="cpu")


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
