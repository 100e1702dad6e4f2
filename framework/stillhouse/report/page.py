"""The report's page of a run: its headline, tiles and sections. That of a directory of `generate`
is in generation_page.py."""

from collections.abc import Sequence
from pathlib import Path

from stillhouse import atomic
from stillhouse.errors import UserError
from stillhouse.report import summary as numbers
from stillhouse.report.facts import facts_list, num_ranks
from stillhouse.report.figures import (
    fidelity_panels,
    heldout_panels,
    pace_panels,
    time_panel,
    training_panels,
)
from stillhouse.report.frame import (
    Config,
    config_in,
    framed,
    last_words,
    resolved,
    status,
    tiles,
)
from stillhouse.report.generation import summarise_generation
from stillhouse.report.generation_page import generation_page
from stillhouse.report.markup import ABSENT, escape, note, panel, panels
from stillhouse.report.samples import samples_section
from stillhouse.report.summary import Summary, summarise, verdict
from stillhouse.report.tables import (
    costs_table,
    evaluation_table,
    kept_of,
    mixture_table,
    recoveries_table,
)
from stillhouse.report.words import counted, date, duration, large, percent, short_name, small
from stillhouse.store.explain import explain
from stillhouse.terminal import say
from stillhouse.tracking import JournalReader, NewerEvent, RunEvent
from stillhouse.tracking.samples import read_samples


def write_report(run_dir: Path) -> Path:
    """Write report.html into the directory of a run or of `generate`, from what is in it, and
    return its path.

    Works on a run that still goes on, was interrupted, failed, or used cached chunks only. What a
    later version wrote to the journal is left out; the page and a line on standard error say so.
    Raises UserError where no attempt has begun, and StoreError where the page cannot be written.
    """
    # what the directory is of
    reader = JournalReader(run_dir / "journal.jsonl")
    events = reader.new_events()
    newer = _left_out(events, reader.num_shortened)
    if (summary := summarise(events)) is not None:
        samples = samples_section(summary, read_samples(run_dir))
        page = _page(summary, config_in(run_dir / "config.json"), newer, samples=samples)
    elif (generation := summarise_generation(events)) is not None:
        page = generation_page(generation, config_in(run_dir / "generate.json"), newer)
    else:
        raise UserError(
            f"{run_dir} has no run to report: its journal.jsonl is absent or empty; give the "
            "directory of a run, or of `stillhouse generate`, that has begun"
        )

    # its page
    path = run_dir / "report.html"
    try:
        atomic.replace(path, page.encode())
    except OSError as error:
        raise explain(error, doing="write report.html", url=str(run_dir)) from error
    if newer:
        say(f"note: {newer}", error=True)
    return path


def _left_out(events: Sequence[RunEvent], num_shortened: int) -> str:
    """What is left out of a journal that a later version has written to; empty where nothing is."""
    found = (
        (sum(isinstance(event, NewerEvent) for event in events), "of a newer version left out"),
        (num_shortened, "shown without values of a newer version"),
    )
    return "; ".join(f"{counted(number, 'row')} {words}" for number, words in found if number)


def _page(summary: Summary, config: Config, newer: str, *, samples: str) -> str:
    """The whole page; `newer` says what was left out of the journal, if anything. `samples` is its
    section on rollouts, as HTML."""
    # Names, and sentences for empty sections.
    start = summary.start
    student = escape(short_name(start.student))
    teacher = escape(short_name(start.teacher)) if start.teacher else "the text itself"
    no_chunks = "No chunk was computed in this run: every target came from the store."
    no_pace = "Nothing was produced and nothing trained in this run, so there is no pace to show."

    # From top to bottom.
    body = f"""<header>
<p class="kicker">Stillhouse report · {status(summary.end, summary.num_attempts)}</p>
<h1>{escape(verdict(summary))}</h1>
<p class="models">{"Teacher " if start.teacher else ""}<b>{teacher}</b> → student <b>{student}</b> ·
begun {date(summary.first_time)}</p>
{last_words(summary.end)}
</header>
{_tiles(summary)}
<h2>Held-out evaluation</h2>
{evaluation_table(summary)}
<h2>Training</h2>
{panels(heldout_panels(summary) + training_panels(summary), "No step was taken in this run.")}
<h2>Fidelity of the targets</h2>
{panels(fidelity_panels(summary), no_chunks)}
<h2>Pace</h2>
{panels(pace_panels(summary), no_pace)}
{_time(summary)}
{_mixture(summary)}
{samples}
<h2>What a target token costs</h2>
{costs_table(summary)}
<h2>Facts of the run</h2>
{facts_list(summary, config)}
<h2>Run it again</h2>
<pre class="command">{escape(chr(10).join(summary.commands))}</pre>
{resolved(config, name="config.json")}
{note(f"Of the journal: {newer}.") if newer else ""}
<footer>Written by Stillhouse from what the run directory holds: journal, config and samples.
Entropies and divergences are in nats, means over target tokens.</footer>"""
    return framed(body, title=f"{student} from {teacher}")


def _tiles(summary: Summary) -> str:
    """Six figures of the run: its targets, its speed and its time."""
    start, chunks = summary.start, summary.chunks

    # Means over the target tokens that this run computed.
    kept = codec_kl = teacher_rate = student_rate = ABSENT
    kept_detail = kl_detail = teacher_detail = "no chunk was computed"
    if tokens := sum(chunk.num_tokens for chunk in chunks):
        kept = percent(sum(chunk.kept_mass * chunk.num_tokens for chunk in chunks) / tokens)
        kept_detail = f"mean of {large(tokens)} tokens"
        codec_kl = small(sum(chunk.codec_kl * chunk.num_tokens for chunk in chunks) / tokens)
        kl_detail = f"nats; worst token {small(max(chunk.worst_kl for chunk in chunks))}"
        teacher_rate = large(numbers.mean_rate(numbers.teacher_tokens(summary)))
        teacher_detail = f"{counted(start.num_teachers, 'replica')} asked for"

    # The student's speed within its steps, and the run's time.
    if summary.student:
        steps = numbers.train_tokens(summary, "student")
        seconds = max(sum(each.end - each.begin for each in steps), 1e-9)
        student_rate = large(sum(each.amount for each in steps) / seconds)
    ranks = num_ranks(summary)
    student_detail = f"{ranks} rank{'' if ranks == '1' else 's'}, ZeRO {start.zero_stage}"
    idle = f", {duration(summary.idle_s)} between" if summary.idle_s > 1 else ""
    attempts = f"{counted(summary.num_attempts, 'attempt')}{idle}"

    # The tiles themselves: label, value, detail.
    of_vocabulary = f"{kept_of(start)} of {start.vocab_size:,}"
    found = [
        ("Bytes a target token", f"{start.bytes_per_token:,}", of_vocabulary),
        ("Kept mass", kept, kept_detail),
        ("Codec KL", codec_kl, kl_detail),
        ("Teachers, tokens/s", teacher_rate, teacher_detail),
        ("Student, tokens/s", student_rate, student_detail),
        ("Run time", duration(summary.run_s), attempts),
    ]
    return tiles(found)


def _time(summary: Summary) -> str:
    """Where the time went, and what the run recovered from; empty where no worker was active."""
    drawn = time_panel(summary)
    if drawn is None:
        return ""
    return f"<h2>Where the time went</h2>\n{panel(drawn)}\n{recoveries_table(summary)}"


def _mixture(summary: Summary) -> str:
    """What was trained on, where that is several data sets."""
    drawn = mixture_table(summary)
    return f"<h2>The mixture that was trained on</h2>\n{drawn}" if drawn else ""
