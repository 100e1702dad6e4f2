"""The report's list of facts: models, corpus, targets, schedule, ranks and versions of a run.

They are taken from the journal where it has them: a config holds only what was asked for last.
"""

from collections.abc import Mapping
from typing import Any

from stillhouse.report.frame import Config
from stillhouse.report.markup import facts
from stillhouse.report.summary import Summary
from stillhouse.report.words import date, short_name
from stillhouse.tracking import schedule_of, words_of


def facts_list(summary: Summary, config: Config) -> str:
    """The facts as a table of two columns; one that is not known is left out."""
    found = [*_of_the_targets(summary, config), *_of_the_training(summary, config)]
    return facts(found, fingerprint=summary.start.recipe_fingerprint)


def _of_the_targets(summary: Summary, config: Config) -> list[tuple[str, str]]:
    """Models, corpus, chunks and targets, each as (name, value)."""
    start, corpus, target = summary.start, config.get("corpus", {}), config.get("target", {})
    dataset = corpus.get("dataset")
    corpus_words = _listed(
        ("", dataset and short_name(str(dataset))),
        ("", corpus.get("subset")),
        ("split", corpus.get("split")),
    )
    target_words = _listed(
        ("k", start.k),
        ("draws", target.get("tail_draws")),
        ("bits", target.get("value_bits")),
        ("temperature", target.get("temperature")),
    )
    length = f"{start.sequence_length:,} tokens, {start.num_targets:,} target tokens"
    return [
        ("Teacher", short_name(start.teacher) if start.teacher else "none: the text itself"),
        ("Student", short_name(start.student)),
        ("Corpus", corpus_words),
        ("Bad rows", _bad_rows(start.bad_rows)),
        ("Sequences", f"{start.num_sequences:,} of {length}"),
        ("Chunks", f"{start.num_chunks:,}, of which this run computed {len(summary.chunks):,}"),
        ("Targets", target_words),
    ]


def _bad_rows(counts: Mapping[str, int]) -> str:
    """How many rows were skipped of which data set; empty where none were."""
    found = ", ".join(f"{count:,} of {short_name(name)}" for name, count in counts.items())
    return f"{found}; skipped, and listed in bad_rows.jsonl" if found else ""


def _of_the_training(summary: Summary, config: Config) -> list[tuple[str, str]]:
    """Loss, schedule, steps, ranks and versions, each as (name, value)."""
    start, student = summary.start, config.get("student", {})
    divergence, first_steps = student.get("divergence"), student.get("forward_kl_steps")
    if first_steps:
        divergence = f"{divergence} (forward_kl for the first {first_steps:,} steps)"
    terms = [
        (student.get("divergence_weight"), divergence),
        (student.get("ce_weight"), "cross-entropy"),
    ]
    batch = student.get("global_batch_sequences")
    control = ", and as many of a control on the text alone" if start.control else ""
    return [
        ("Loss", " + ".join(f"{weight} × {name}" for weight, name in terms if weight)),
        ("Optimiser", _listed(("AdamW, sequences a step", batch))),
        *_schedules(summary),
        ("Steps", f"{_steps(summary)}{control}"),
        ("Ranks", f"{num_ranks(summary)}, DeepSpeed ZeRO stage {start.zero_stage}"),
        ("Attempts", f"{summary.num_attempts}, the first begun {date(summary.first_time)}"),
        ("Versions", _listed(*sorted(start.versions.items()))),
    ]


def _listed(*parts: tuple[str, Any]) -> str:
    """Names and values, without those that have no value."""
    return ", ".join(f"{name} {value}".strip() for name, value in parts if value is not None)


def _schedules(summary: Summary) -> list[tuple[str, str]]:
    """The learning rates of the steps that were taken; before the first, those asked for."""
    trained = {role: words_of(found) for role, found in summary.trained.items()}
    if not trained:
        asked = schedule_of(summary.start)
        return [("Schedule", f"{asked.words()}; no step was taken yet")] if asked else []
    if len(set(trained.values())) == 1:
        return [("Schedule", next(iter(trained.values())))]
    return [(f"Schedule of the {role}", words) for role, words in trained.items()]


def _steps(summary: Summary) -> str:
    total = summary.start.total_steps
    taken = summary.student[-1].step if summary.student else total
    return f"{total:,}" if taken == total else f"{taken:,} taken, {total:,} asked for last"


def num_ranks(summary: Summary) -> str:
    """How many ranks took the student's steps, such as "2 to 4"; before the first step, how many
    are asked for."""
    stretches = summary.trained.get("student", ())
    sizes = sorted({size for each in stretches for size in each.world_sizes})
    if not sizes:
        return f"{summary.start.world_size}"
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
