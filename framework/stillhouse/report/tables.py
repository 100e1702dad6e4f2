"""The report's tables: held-out evaluation, recoveries, the parts of a mixture, and what a
target token costs."""

import math
from collections.abc import Callable

from stillhouse.report.goodput import incidents, recoveries
from stillhouse.report.markup import ABSENT, escape, note, table
from stillhouse.report.summary import Summary
from stillhouse.report.words import duration, large, num_bytes, percent, short_name, times
from stillhouse.tracking import EvalEvent, StartEvent

_MODELS = {
    "teacher": "Teacher",
    "student": "Student, distilled",
    "control": "Control, text alone",
}
# A column: its name, its value for a model, and how that is written.
_SCORES: list[tuple[str, Callable[[EvalEvent], float | None], Callable[[float], str]]] = [
    ("Cross-entropy", lambda scores: scores.cross_entropy, lambda value: f"{value:.3f}"),
    (
        "Perplexity",
        lambda scores: math.exp(min(scores.cross_entropy, 700.0)),
        lambda value: f"{value:,.2f}" if value < 1e6 else f"{value:.2g}",
    ),
    (
        "KL(teacher ‖ model)",
        lambda scores: _of_a_student(scores, scores.kl),
        lambda value: f"{value:.3f}",
    ),
    ("Top-1 agreement", lambda scores: _of_a_student(scores, scores.agreement), percent),
    ("Calibration error", lambda scores: scores.calibration_error, percent),
    ("Speculative acceptance", lambda scores: _of_a_student(scores, scores.acceptance), percent),
]


def _of_a_student(scores: EvalEvent, value: float | None) -> float | None:
    """A score that compares with the teacher; None for the teacher itself."""
    return None if scores.model == "teacher" else value


def evaluation_table(summary: Summary) -> str:
    """The dense scores of teacher, student and control on held-out text, as far as they exist."""
    found = [summary.evals[model] for model in _MODELS if model in summary.evals]
    if not found:
        return "<p>Nothing was evaluated yet.</p>"
    has_teacher = summary.start.teacher is not None
    sizes = " or ".join(f"{size:,}" for size in sorted({each.num_tokens for each in found}))
    words = f"On {sizes} held-out target tokens, exact over the whole vocabulary."
    if has_teacher and "control" not in summary.evals:
        words += " No control was evaluated."
    words += " Calibration is of the top-1 choice against the text."
    if has_teacher:
        words += (
            " Acceptance is the share of the model’s drafts that the teacher would take in "
            "speculative decoding."
        )
    names = ("Model", "Step", *(name for name, _, _ in _SCORES))
    of_models = _MODELS if has_teacher else _MODELS | {"student": "Student, text alone"}
    body = "".join(_scores_of(scores, of_models[scores.model]) for scores in found)
    return table("scores", names, body) + note(words)


def _scores_of(scores: EvalEvent, name: str) -> str:
    """A model's line of the evaluation table."""
    values = [(read(scores), show) for _, read, show in _SCORES]
    cells = "".join(
        f"<td>{escape(ABSENT if value is None else show(value))}</td>" for value, show in values
    )
    step = ABSENT if scores.model == "teacher" else f"{scores.step:,}"
    key = f'<span class="key" style="background:var(--{escape(scores.model)})"></span>'
    strong = ' class="strong"' if scores.model == "student" else ""
    return f"<tr{strong}><th>{key}{name}</th><td>{step}</td>{cells}</tr>"


def recoveries_table(summary: Summary) -> str:
    """What the run recovered from, and its incidents in a sentence; empty where nothing failed."""
    names = ("Went on at", "Whose", "Cause", "Seconds", "Steps again", "What happened")
    body = "".join(
        f"<tr><th>{escape(duration(each.at))}</th><td>{escape(each.whose)}</td>"
        f"<td>{escape(each.cause)}</td><td>{each.seconds:.1f}</td><td>{each.lost_steps:,}</td>"
        f"<td>{escape(each.detail)}</td></tr>"
        for each in recoveries(summary)
    )
    words = "; ".join(incidents(summary))
    return (table("recoveries", names, body) if body else "") + (note(f"{words}.") if words else "")


def mixture_table(summary: Summary) -> str:
    """Each data set's share of the target tokens of an epoch; empty where there are not several."""
    found = summary.start.corpus_targets
    if len(found) < 2:
        return ""
    total = max(sum(found.values()), 1)
    body = "".join(
        f"<tr><th>{escape(short_name(name))}</th><td>{num_targets:,}</td>"
        f'<td class="bar"><i style="width:{100 * num_targets / total:.1f}%"></i></td>'
        f"<td>{percent(num_targets / total)}</td></tr>"
        for name, num_targets in found.items()
    )
    return table("mixture", ("Data set", "Target tokens", "", "Share"), body)


def costs_table(summary: Summary) -> str:
    """Bytes of a target in three encodings, with bars on a logarithmic scale."""
    start = summary.start
    ways = [
        (f"Stillhouse record, {kept_of(start)} and the tail's mass", start.bytes_per_token),
        (f"int32 ids and float16 values, {kept_of(start)}", 6 * start.k + 4 * start.num_draws),
        ("float16 over the whole vocabulary", 2 * start.vocab_size),
    ]
    largest = math.log10(max(size for _, size in ways) + 1)
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{size:,}</td>"
        f'<td class="bar"><i style="width:{100 * math.log10(size + 1) / largest:.1f}%"></i></td>'
        f"<td>{num_bytes(size * start.num_targets)}</td>"
        f"<td>{times(size / max(start.bytes_per_token, 1))}</td></tr>"
        for name, size in ways
    )
    all_targets = f"All {large(start.num_targets)} targets"
    names = ("Encoding", "Bytes a token", "", all_targets, "Relative")
    return table("costs", names, body) + note("Bars are logarithmic.")


def kept_of(start: StartEvent) -> str:
    """What a target keeps of the teacher's distribution, in words."""
    return f"k = {start.k}" + (f" and {start.num_draws} draws" if start.num_draws else "")
