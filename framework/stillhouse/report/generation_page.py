"""The report's page of a directory of `generate`: what was written, how fast, by whom."""

from stillhouse.report.figures import writing_panels
from stillhouse.report.frame import Config, framed, last_words, resolved, status, tiles
from stillhouse.report.generation import (
    GenerationSummary,
    WriterWork,
    headline,
    mishaps,
    samples_of,
    work_of_writers,
)
from stillhouse.report.markup import ABSENT, escape, facts, note, panels, table
from stillhouse.report.summary import mean_rate
from stillhouse.report.words import counted, date, duration, large, num_bytes, percent, short_name
from stillhouse.tracking import CostEvent

_MOST_WRITERS = 32  # of which there is a line


def generation_page(summary: GenerationSummary, config: Config, newer: str) -> str:
    """The whole page; `newer` says what was left out of the journal, if anything."""
    writer = escape(short_name(summary.start.writer))
    wrong = "; ".join(mishaps(summary))
    body = f"""<header>
<p class="kicker">Stillhouse report · {status(summary.end, summary.num_attempts)}</p>
<h1>{escape(headline(summary))}</h1>
<p class="models">Writer <b>{writer}</b> · begun {date(summary.first_time)}</p>
{last_words(summary.end)}
</header>
{_tiles(summary)}
<h2>Pace</h2>
{panels(writing_panels(summary), "No shard was written from this directory.")}
<h2>Writers</h2>
{_writers(summary)}
{note(f"{wrong}.") if wrong else ""}
<h2>Facts</h2>
{_facts(summary, config)}
<h2>Run it again</h2>
<pre class="command">{escape(chr(10).join(summary.commands))}</pre>
{resolved(config, name="generate.json")}
{note(f"Of the journal: {newer}.") if newer else ""}
<footer>Written by Stillhouse from journal.jsonl and generate.json. Samples, and what graders say of
them, are in the report of a run that trains on them.</footer>"""
    return framed(body, title=f"What {writer} wrote")


def _tiles(summary: GenerationSummary) -> str:
    """Six figures: what was written from this directory, its speed and its time."""
    # what was written
    start, shards = summary.start, summary.shards
    num_samples = sum(map(samples_of, shards))
    ended, cut, aside = (
        sum(getattr(shard, name) for shard in shards)
        for name in ("num_ended", "num_cut", "num_set_aside")
    )
    num_tokens = sum(shard.num_tokens for shard in shards)
    size = num_bytes(sum(shard.num_bytes for shard in shards))

    # values that there may not be, and details
    share = percent(ended / num_samples) if num_samples else ABSENT
    rate = large(mean_rate(summary.tokens)) if shards else ABSENT
    mean = f"{num_tokens / num_samples:,.0f} a sample" if num_samples else "nothing was written"
    replicas = f"{counted(start.num_writers, 'replica')} asked for"
    idle = f", {duration(summary.idle_s)} between" if summary.idle_s > 1 else ""
    attempts = f"{counted(summary.num_attempts, 'attempt')}{idle}"

    # the tiles themselves: label, value, detail
    return tiles(
        [
            ("Shards", f"{len(shards):,}", f"of {start.num_shards:,}, {size}"),
            ("Samples", large(num_samples), f"{start.samples:,} of each prompt"),
            ("Ended themselves", share, f"{cut:,} cut, {aside:,} set aside"),
            ("Sampled tokens", large(num_tokens), mean),
            ("Writers, tokens/s", rate, replicas),
            ("Run time", duration(summary.run_s), attempts),
        ]
    )


def _writers(summary: GenerationSummary) -> str:
    """A line for each writer, those that wrote most first where there are too many."""
    work = work_of_writers(summary)
    if not work:
        return "<p>No writer was ready in this directory.</p>"
    shown = work
    if len(work) > _MOST_WRITERS:
        shown = sorted(work, key=lambda each: -each.num_tokens)[:_MOST_WRITERS]
    body = "".join(map(_writers_line, shown))
    names = ("Writer", "Device", "Seconds to ready", "Shards", "Tokens", "Tokens/s at work")
    more = f"{len(work) - len(shown):,} more writers wrote less." if len(work) > len(shown) else ""
    return table("writers", names, body) + (note(more) if more else "")


def _writers_line(work: WriterWork) -> str:
    ready = ABSENT if work.seconds_to_ready is None else f"{work.seconds_to_ready:.1f}"
    rate = large(work.num_tokens / work.seconds) if work.seconds else ABSENT
    return (
        f"<tr><th>{work.replica}, attempt {work.attempt}</th>"
        f"<td>{escape(work.device) or ABSENT}</td><td>{ready}</td><td>{work.num_shards:,}</td>"
        f"<td>{large(work.num_tokens)}</td><td>{rate}</td></tr>"
    )


def _cost(cost: CostEvent) -> str:
    return f"{cost.granted_usd:,.4g} of {cost.limit_usd:,g} USD spent or reserved at its server"


def _facts(summary: GenerationSummary, config: Config) -> str:
    """Names and values, as a table of two columns; one that is not known is left out."""
    start, prompts = summary.start, config.get("prompts", {})
    sampling, store = config.get("sampling", {}), config.get("store", {})
    drawn = ("temperature", "top_p", "max_new_tokens", "sequence_length", "seed")
    bad = f"{start.bad_rows:,}; skipped" if start.bad_rows else ""
    found = [
        ("Writer", short_name(start.writer)),
        ("Prompts", f"{start.num_prompts:,} of {short_name(str(prompts.get('dataset', '')))}"),
        ("Bad rows", bad),
        ("Sampling", ", ".join(f"{name} {sampling[name]}" for name in drawn if name in sampling)),
        ("Store", str(store.get("url", ""))),
        ("Cost", "" if summary.cost is None else _cost(summary.cost)),
        ("Attempts", f"{summary.num_attempts}, the first begun {date(summary.first_time)}"),
        (
            "Versions",
            ", ".join(f"{name} {value}" for name, value in sorted(start.versions.items())),
        ),
        ("Data set of a run", f"rollouts://{start.recipe_fingerprint[:16]}"),
    ]
    return facts(found, fingerprint=start.recipe_fingerprint)
