"""The page: verdict, tiles, tables and figures as one HTML file that asks nothing of the network.

Invariant: every text that came from outside passes `escape`, which also scrubs it of secrets.
"""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from stillhouse import atomic
from stillhouse.errors import UserError
from stillhouse.redaction import scrub
from stillhouse.report import summary as numbers
from stillhouse.report.figures import (
    Panel,
    fidelity_panels,
    pace_panels,
    time_panel,
    training_panels,
)
from stillhouse.report.goodput import incidents, recoveries
from stillhouse.report.summary import Summary, summarise, verdict
from stillhouse.report.words import (
    date,
    duration,
    large,
    num_bytes,
    percent,
    short_name,
    small,
    times,
)
from stillhouse.store.explain import explain
from stillhouse.terminal import say
from stillhouse.tracking import (
    EvalRow,
    JournalReader,
    NewerRow,
    Row,
    StartRow,
    schedule_of,
    words_of,
)

_ABSENT = "–"


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run directory, from its journal.jsonl and config.json, and return
    its path.

    Works on a run that still goes on, was interrupted, failed, or used cached chunks only. What a
    later version wrote is left out, and said. Raises UserError where no attempt has begun, and
    StoreError where the page cannot be written.
    """
    reader = JournalReader(run_dir / "journal.jsonl")
    rows = reader.new_rows()
    summary = summarise(rows)
    if summary is None:
        raise UserError(
            f"{run_dir} has no run to report: its journal.jsonl is absent or empty; give the "
            "directory of a run that has begun"
        )
    path, newer = run_dir / "report.html", _newer(rows, reader.num_shortened)
    page = _page(summary, _config(run_dir / "config.json"), newer).encode()
    try:
        atomic.replace(path, page)
    except OSError as error:
        raise explain(error, doing="write report.html", url=str(run_dir)) from error
    if newer:
        say(f"note: {newer}", error=True)
    return path


def _newer(rows: Sequence[Row], num_shortened: int) -> str:
    """What is left out of a journal that a later version has written to; empty where nothing is."""
    num_rows = sum(isinstance(row, NewerRow) for row in rows)
    found = (
        (num_rows, "{} of a newer version left out"),
        (num_shortened, "{} shown without values of a newer version"),
    )
    return "; ".join(words.format(_count(number, "row")) for number, words in found if number)


def escape(value: object) -> str:
    """A text from outside, fit for HTML and free of secrets."""
    return html.escape(scrub(str(value)))


def _config(path: Path) -> dict[str, Any]:
    """The resolved configuration, scrubbed; empty where it is absent or unreadable, for the journal
    is enough for a report."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        scrub({name: value for name, value in values.items() if isinstance(value, dict)})
        if isinstance(values, dict)
        else {}
    )


def _page(summary: Summary, config: Mapping[str, Any], newer: str) -> str:
    student, teacher = (
        escape(short_name(name)) for name in (summary.start.student, summary.start.teacher)
    )
    style = (files("stillhouse.report") / "report.css").read_text(encoding="utf-8")
    no_chunks = "No chunk was computed in this run: every target came from the store."
    no_pace = "Nothing was produced and nothing trained in this run, so there is no pace to show."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{student} from {teacher} · Stillhouse report</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<p class="kicker">Stillhouse report · {_status(summary)}</p>
<h1>{escape(verdict(summary))}</h1>
<p class="models">Teacher <b>{teacher}</b> → student <b>{student}</b> ·
begun {date(summary.first_time)}</p>
{_last_words(summary)}
</header>
{_tiles(summary)}
<h2>Held-out evaluation</h2>
{_evaluation(summary)}
<h2>Training</h2>
{_panels(training_panels(summary), "No step was taken in this run.")}
<h2>Fidelity of the targets</h2>
{_panels(fidelity_panels(summary) if summary.chunks else [], no_chunks)}
<h2>Pace</h2>
{_panels(pace_panels(summary), no_pace)}
{_time(summary)}
<h2>What a target token costs</h2>
{_costs(summary)}
<h2>Facts of the run</h2>
{_facts(summary, config)}
<h2>Run it again</h2>
<pre class="command">{escape(chr(10).join(summary.commands))}</pre>
{_resolved(config)}
{f'<p class="note">Of the journal: {escape(newer)}.</p>' if newer else ""}
<footer>Written by Stillhouse from journal.jsonl and config.json.
Entropies and divergences are in nats, means over target tokens.</footer>
</main>
</body>
</html>
"""


def _status(summary: Summary) -> str:
    if summary.end is None:
        return (
            f'<span class="status-open">attempt {summary.num_attempts} has no end: running, or '
            "killed</span>"
        )
    return (
        f'<span class="status-{escape(summary.end.outcome)}">{escape(summary.end.outcome)}</span>'
    )


def _last_words(summary: Summary) -> str:
    if summary.end is None or not summary.end.message:
        return ""
    return f'<p class="note">The last attempt ended with: {escape(summary.end.message)}</p>'


def _tiles(summary: Summary) -> str:
    start, chunks = summary.start, summary.chunks
    tokens = sum(row.num_tokens for row in chunks)
    kept = codec_kl = teacher_rate = student_rate = _ABSENT
    kept_detail = kl_detail = "no chunk was computed"
    if tokens:
        kept = percent(sum(row.kept_mass * row.num_tokens for row in chunks) / tokens)
        codec_kl = small(sum(row.codec_kl * row.num_tokens for row in chunks) / tokens)
        kept_detail = f"mean of {large(tokens)} tokens"
        kl_detail = f"nats; worst token {small(max(row.worst_kl for row in chunks))}"
        teacher_rate = large(numbers.mean_rate(numbers.teacher_tokens(summary)))
    if summary.student:
        steps = numbers.train_tokens(summary, "student")
        student_rate = large(
            sum(each.amount for each in steps)
            / max(sum(each.end - each.begin for each in steps), 1e-9)
        )
    idle = f", {duration(summary.idle_s)} between" if summary.idle_s > 1 else ""
    tiles = [
        (
            "Bytes a target token",
            f"{start.bytes_per_token:,}",
            f"{_kept(start)} of {start.vocab_size:,}",
        ),
        ("Kept mass", kept, kept_detail),
        ("Codec KL", codec_kl, kl_detail),
        (
            "Teachers, tokens/s",
            teacher_rate,
            f"{_count(start.num_teachers, 'replica')} asked for" if tokens else kept_detail,
        ),
        (
            "Student, tokens/s",
            student_rate,
            f"{_ranks(summary)} rank{'' if _ranks(summary) == '1' else 's'}, ZeRO "
            f"{start.zero_stage}",
        ),
        ("Run time", duration(summary.run_s), _count(summary.num_attempts, "attempt") + idle),
    ]
    cells = (
        f'<div class="tile"><div class="label">{escape(label)}</div><div '
        f'class="value">{escape(value)}</div>'
        f'<div class="detail">{escape(detail)}</div></div>'
        for label, value, detail in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


_COLUMNS: list[tuple[str, Callable[[EvalRow], float | None], Callable[[float], str]]] = [
    ("Cross-entropy", lambda row: row.cross_entropy, lambda value: f"{value:.3f}"),
    (
        "Perplexity",
        lambda row: math.exp(min(row.cross_entropy, 700.0)),
        lambda value: f"{value:,.2f}" if value < 1e6 else f"{value:.2g}",
    ),
    (
        "KL(teacher ‖ model)",
        lambda row: row.kl if row.model != "teacher" else None,
        lambda value: f"{value:.3f}",
    ),
    ("Top-1 agreement", lambda row: row.agreement if row.model != "teacher" else None, percent),
    ("Calibration error", lambda row: row.calibration_error, percent),
    (
        "Speculative acceptance",
        lambda row: row.acceptance if row.model != "teacher" else None,
        percent,
    ),
]
_MODEL_WORDS = {
    "teacher": "Teacher",
    "student": "Student, distilled",
    "control": "Control, text alone",
}


def _evaluation(summary: Summary) -> str:
    rows = [
        summary.evals[model]
        for model in ("teacher", "student", "control")
        if model in summary.evals
    ]
    if not rows:
        return "<p>Nothing was evaluated yet.</p>"
    head = "".join(
        f"<th>{escape(name)}</th>" for name in ("Model", "Step", *(name for name, _, _ in _COLUMNS))
    )
    body = "".join(_evaluation_row(row) for row in rows)
    sizes = sorted({row.num_tokens for row in rows})
    words = (
        f"On {' or '.join(f'{size:,}' for size in sizes)} held-out target tokens, both "
        "distributions exact over the whole vocabulary."
    )
    if "control" not in summary.evals:
        words += " No control was evaluated."
    return (
        '<div class="scroll"><table '
        f'class="scores"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{escape(words)} Calibration is of the top-1 choice against the text. '
        "Acceptance is the share of the "
        "model’s drafts that the teacher would take in speculative decoding.</p>"
    )


def _evaluation_row(row: EvalRow) -> str:
    values = [(read(row), show) for _, read, show in _COLUMNS]
    cells = "".join(
        f"<td>{escape(_ABSENT if value is None else show(value))}</td>" for value, show in values
    )
    step = _ABSENT if row.model == "teacher" else f"{row.step:,}"
    key = f'<span class="key" style="background:var(--{escape(row.model)})"></span>'
    strong = ' class="strong"' if row.model == "student" else ""
    return f"<tr{strong}><th>{key}{_MODEL_WORDS[row.model]}</th><td>{step}</td>{cells}</tr>"


def _panels(panels: Sequence[Panel], otherwise: str) -> str:
    if not panels:
        return f"<p>{escape(otherwise)}</p>"
    return f'<div class="panels">{"".join(map(_panel, panels))}</div>'


def _panel(panel: Panel) -> str:
    keys = "".join(
        f'<span><span class="key" style="background:var({variable})"></span>{escape(label)}</span>'
        for label, variable in panel.legend
    )
    title = f'<div class="title">{escape(panel.title)}<span class="legend">{keys}</span></div>'
    svg = panel.svg.replace("<svg ", f'<svg aria-label="{escape(panel.title)}" ', 1)
    return f"<figure>{title}{svg}<figcaption>{escape(panel.caption)}</figcaption></figure>"


def _time(summary: Summary) -> str:
    """Where the time went, and what the run recovered from; nothing where nobody was at work."""
    panel = time_panel(summary)
    if panel is None:
        return ""
    return f"<h2>Where the time went</h2>\n{_panel(panel)}\n{_recoveries(summary)}"


def _recoveries(summary: Summary) -> str:
    rows = "".join(
        f"<tr><th>{escape(duration(each.at))}</th><td>{escape(each.whose)}</td><td>{escape(each.cause)}</td>"
        f"<td>{each.seconds:.1f}</td><td>{each.lost_steps:,}</td><td>{escape(each.detail)}</td></tr>"
        for each in recoveries(summary)
    )
    names = ("Went on at", "Whose", "Cause", "Seconds", "Steps again", "What happened")
    head = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>"
    table = (
        f'<div class="scroll"><table class="recoveries">{head}<tbody>{rows}</tbody></table></div>'
        if rows
        else ""
    )
    words = incidents(summary)
    return table + (f'<p class="note">{escape("; ".join(words))}.</p>' if words else "")


def _kept(start: StartRow) -> str:
    return f"k = {start.k}" + (f" and {start.num_draws} draws" if start.num_draws else "")


def _costs(summary: Summary) -> str:
    start = summary.start
    ways = [
        (f"Stillhouse record, {_kept(start)} and the tail's mass", start.bytes_per_token),
        (f"int32 ids and float16 values, {_kept(start)}", 6 * start.k + 4 * start.num_draws),
        ("float16 over the whole vocabulary", 2 * start.vocab_size),
    ]
    largest = math.log10(max(size for _, size in ways) + 1)
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{size:,}</td>"
        f'<td class="bar"><i style="width:{100 * math.log10(size + 1) / largest:.1f}%"></i></td>'
        f"<td>{num_bytes(size * start.num_targets)}</td>"
        f"<td>{times(size / max(start.bytes_per_token, 1))}</td></tr>"
        for name, size in ways
    )
    return (
        '<div class="scroll"><table class="costs"><thead><tr><th>Encoding</th><th>Bytes a '
        "token</th><th></th>"
        f"<th>All {large(start.num_targets)} "
        f"targets</th><th>Relative</th></tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="note">Bars are logarithmic.</p>'
    )


def _facts(summary: Summary, config: Mapping[str, Any]) -> str:
    start = summary.start

    def setting(section: str, name: str) -> Any:
        values = config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    def together(*parts: tuple[str, Any]) -> str:
        return ", ".join(f"{name} {value}".strip() for name, value in parts if value is not None)

    terms = [
        (setting("student", "divergence_weight"), setting("student", "divergence")),
        (setting("student", "ce_weight"), "cross-entropy"),
    ]
    loss = " + ".join(f"{weight} × {name}" for weight, name in terms if weight)
    corpus = setting("corpus", "dataset")
    facts = [
        ("Teacher", short_name(start.teacher)),
        ("Student", short_name(start.student)),
        (
            "Corpus",
            together(
                ("", corpus and short_name(str(corpus))),
                ("", setting("corpus", "subset")),
                ("split", setting("corpus", "split")),
            ),
        ),
        (
            "Sequences",
            f"{start.num_sequences:,} of {start.sequence_length:,} tokens, {start.num_targets:,} "
            "target tokens",
        ),
        ("Chunks", f"{start.num_chunks:,}, of which this run computed {len(summary.chunks):,}"),
        (
            "Targets",
            together(
                ("k", start.k),
                ("draws", setting("target", "tail_draws")),
                ("bits", setting("target", "value_bits")),
                ("temperature", setting("target", "temperature")),
            ),
        ),
        ("Loss", loss),
        (
            "Optimiser",
            together(("AdamW, sequences a step", setting("student", "global_batch_sequences"))),
        ),
        *_schedules(summary),
        (
            "Steps",
            _steps(summary)
            + (", and as many of a control on the text alone" if start.control else ""),
        ),
        ("Ranks", f"{_ranks(summary)}, DeepSpeed ZeRO stage {start.zero_stage}"),
        ("Attempts", f"{summary.num_attempts}, the first begun {date(summary.first_time)}"),
        ("Versions", together(*sorted(start.versions.items()))),
    ]
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in facts
        if value
    )
    recipe = f"<tr><th>Recipe</th><td><code>{escape(start.recipe_fingerprint)}</code></td></tr>"
    return f'<table class="facts"><tbody>{rows}{recipe}</tbody></table>'


def _schedules(summary: Summary) -> list[tuple[str, str]]:
    """The learning rates in force at the steps that were taken: a config holds what was asked for
    last."""
    trained = {role: words_of(found) for role, found in summary.trained.items()}
    if not trained:
        return [
            (
                "Schedule",
                f"{asked.words()}; no step was taken yet"
                if (asked := schedule_of(summary.start))
                else "",
            )
        ]
    if len(set(trained.values())) == 1:
        return [("Schedule", next(iter(trained.values())))]
    return [(f"Schedule of the {role}", words) for role, words in trained.items()]


def _steps(summary: Summary) -> str:
    total = summary.start.total_steps
    taken = summary.student[-1].step if summary.student else total
    return f"{total:,}" if taken == total else f"{taken:,} taken, {total:,} asked for last"


def _ranks(summary: Summary) -> str:
    """How many took the student's steps; before the first, how many are asked for."""
    sizes = sorted(
        {size for each in summary.trained.get("student", ()) for size in each.world_sizes}
    )
    if not sizes:
        return f"{summary.start.world_size}"
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _resolved(config: Mapping[str, Any]) -> str:
    if not config:
        return "<p>The run directory has no readable config.json.</p>"
    summary = "<summary>Resolved configuration, as it was last asked for</summary>"
    return f"<details>{summary}<pre>{escape(json.dumps(config, indent=2))}</pre></details>"
