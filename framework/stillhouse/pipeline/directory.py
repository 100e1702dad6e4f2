"""The run directory: whose it is, what may change when it is used again, and an attempt's start and end in its journal.

config.json  recipe.json     what was asked
journal.jsonl                what happened
checkpoints/                 what came of it
wandb/  report.html          how it looks
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Literal

import xxhash

from stillhouse import atomic
from stillhouse.config import Config, StudentSection, parse_config, resolved_json
from stillhouse.errors import ConfigError, InterruptedRunError, RecipeError
from stillhouse.pipeline.plan import Plan
from stillhouse.store import ChunkStore, differences, parse_recipe
from stillhouse.store.readers import leave, reader_name
from stillhouse.student.job import where_it_goes_on
from stillhouse.tracking import EndRow, EvalRow, Journal, JournalReader, ProgressView, StartRow, WandbView

_FOLLOW_EVERY_S = 0.5
_SEAL = "xxh3"  # the name of the checksum among the config's sections
_VERSIONED = ("stillhouse", "torch", "deepspeed", "ray", "transformers", "datasets", "wandb")

# What may differ when a run directory is used again. Everything else decides a target, a batch or a gradient.
_PLACEMENT = {"device", "num_cpus", "num_gpus", "resources", "max_failures", "block_tokens"}
_MAY_CHANGE: Mapping[str, set[str]] = {
    "student": _PLACEMENT
    | {"learning_rate", "min_learning_rate", "warmup_steps", "epochs", "max_steps"}
    | {"tail_as_bucket"}  # it lets a training begin, and decides no weight
    | {"num_workers", "min_workers", "watchdog_s", "regroup_s"}
    | {"checkpoint_every_steps", "checkpoint_url", "keep_checkpoints", "prefetch_batches", "activation_checkpointing"},
    "teacher": _PLACEMENT | {"min_replicas", "max_replicas", "batch_sequences", "max_set_aside", "lease_timeout_s"},
    "store": {"url", "window_bytes", "retain"},
}
_MAY_CHANGE_WHOLLY = frozenset({"evaluate", "tracking", "cluster"})


def config_of(run_dir: Path) -> Config:
    """The resolved config that a run directory was last used with.

    Raises RecipeError where it is no run directory, ConfigError where its config is damaged.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise RecipeError(f"{run_dir} is not a run directory: it has no config.json; name the --run-dir of an earlier run")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        seal = values.pop(_SEAL, None)
        if seal is not None and seal != _digest_of(values):
            raise ValueError("its checksum differs")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it, and start the run again with its own config file") from None
    try:
        return parse_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _sealed(config: Config) -> bytes:
    """What config.json holds: every value, and their checksum."""
    values = json.loads(resolved_json(config))
    return (json.dumps({**values, _SEAL: _digest_of(values)}, indent=2) + "\n").encode()


def _digest_of(values: dict[str, object]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def changes_that_matter(before: Config, after: Config) -> list[str]:
    """What differs beyond what a resumed run may change, each as 'section.key: before -> after'."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return [
        f"{section}.{key}: {old[section][key]!r} -> {new[section][key]!r}"
        for section in old
        if section not in _MAY_CHANGE_WHOLLY
        for key in old[section]
        if key not in _MAY_CHANGE.get(section, set()) and old[section][key] != new[section][key]
    ]


def changes_since(plan: Plan) -> list[str]:
    """What keeps this plan from going on with its run directory; empty where nothing does, or where there is no run yet."""
    config_path, recipe_path = plan.run_dir / "config.json", plan.run_dir / "recipe.json"
    changes = changes_that_matter(config_of(plan.run_dir), plan.config) if config_path.exists() else []
    if not changes and recipe_path.exists():
        changes = differences(parse_recipe(recipe_path.read_bytes(), where=str(recipe_path)), plan.recipe)
    return changes


@contextmanager
def attempt(plan: Plan, command: str) -> Iterator[Journal]:
    """One use of the run directory: claims it, journals start and end, and shows the journal while the block lasts.

    Raises RecipeError where the directory belongs to another run.
    """
    began = monotonic()
    before = _claim(plan)
    store = ChunkStore.create(plan.config.store.url, plan.recipe)
    if before is not None:
        _leave_former_place(plan, before.student, store)
    journal = Journal(plan.run_dir / "journal.jsonl")
    num_earlier = sum(isinstance(row, StartRow) for row in JournalReader(journal.path).new_rows())
    journal.record(_start_row(plan, command, num_earlier + 1))
    with _ended(journal, began):
        views = _views(plan)
    with _shown(journal.path, views), _ended(journal, began, outcome="done"):
        yield journal


@contextmanager
def _ended(journal: Journal, began: float, *, outcome: Literal["done"] | None = None) -> Iterator[None]:
    """Journal how the block ended: with `outcome` where it went well and one is given, always where it raised."""
    try:
        yield
    except KeyboardInterrupt:
        journal.record(EndRow("interrupted", monotonic() - began, "Ctrl-C; the same command goes on from here"))
        raise
    except InterruptedRunError as error:
        journal.record(EndRow("interrupted", monotonic() - began, str(error)))
        raise
    except BaseException as error:
        journal.record(EndRow("failed", monotonic() - began, str(error)))
        raise
    if outcome is not None:
        journal.record(EndRow(outcome, monotonic() - began, ""))


def _claim(plan: Plan) -> Config | None:
    """Make the directory this plan's, or check that it is. Returns the config that it was last used with."""
    changes = changes_since(plan)
    if changes:
        raise RecipeError(
            f"{plan.run_dir} belongs to another run; these differ:\n"
            + "\n".join(f"  - {change}" for change in changes)
            + "\nSet them back to go on with it, or name another --run-dir."
        )
    try:
        atomic.make_directory(plan.run_dir)
    except OSError as error:
        raise ConfigError(f"cannot make the run directory {plan.run_dir}: {error.strerror}; name another --run-dir") from None
    before = config_of(plan.run_dir) if (plan.run_dir / "config.json").exists() else None
    atomic.replace(plan.run_dir / "recipe.json", plan.recipe.canonical_json())
    atomic.replace(plan.run_dir / "config.json", _sealed(plan.config))
    return before


def _leave_former_place(plan: Plan, before: StudentSection, store: ChunkStore) -> None:
    """Where the checkpoints' place changed, nobody reads under the name that it gave: the store would keep every chunk for that one."""
    former = where_it_goes_on(before, plan.run_dir)
    if former != where_it_goes_on(plan.config.student, plan.run_dir):
        for role in ("student", "control"):
            leave(store, reader_name(former, role))


def _views(plan: Plan) -> list[ProgressView | WandbView]:
    section = plan.config.tracking
    if section.wandb == "off":
        return [ProgressView()]
    first = next(row for row in JournalReader(plan.run_dir / "journal.jsonl").new_rows() if isinstance(row, StartRow))
    values = plan.config.model_dump(mode="json")
    return [ProgressView(), WandbView(section, plan.run_dir, config=values, run_id=section.run_id or _run_id(first))]


def _start_row(plan: Plan, command: str, number: int) -> StartRow:
    config, corpus = plan.config, plan.split.train
    return StartRow(
        attempt=number,
        command=command,
        versions={name: version(name) for name in _VERSIONED},
        teacher=config.teacher.model,
        student=config.student.model,
        recipe_fingerprint=plan.recipe.fingerprint,
        num_chunks=len(plan.chunks),
        num_sequences=corpus.num_sequences,
        sequence_length=corpus.sequence_length,
        num_targets=corpus.num_targets,
        bytes_per_token=plan.recipe.codec.bytes_per_token,
        num_draws=plan.recipe.num_draws,
        vocab_size=plan.recipe.vocab_size,
        k=plan.recipe.k,
        world_size=config.student.num_workers,
        zero_stage=config.student.zero_stage,
        num_teachers=config.teacher.max_replicas,
        total_steps=plan.total_steps,
        control=config.evaluate.control,
    )


def _rest(num_draws: int) -> str:
    return f"{num_draws} draws from the rest" if num_draws else "the mass of the rest"


def model_card(plan: Plan, role: str) -> str:
    """The README of an exported model: what it learned from, and how well, as far as the journal knows."""
    rows = [row for row in JournalReader(plan.run_dir / "journal.jsonl").new_rows() if isinstance(row, EvalRow)]
    scores = {row.model: row for row in rows}
    config, recipe = plan.config, plan.recipe
    lesson = (
        "the text alone"
        if role == "control"
        else f"the top {recipe.k} log-probabilities of {config.teacher.model} and {_rest(recipe.num_draws)}"
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, stillhouse]",
        "---",
        f"# {Path(config.student.model).name}, distilled from {Path(config.teacher.model).name}",
        "",
        f"Trained by Stillhouse {version('stillhouse')} on {lesson}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| student | {config.student.model} (from {config.student.init}) |",
        f"| teacher | {config.teacher.model}, {config.teacher.dtype} |",
        f"| data | {config.corpus.dataset}, {recipe.num_sequences:,} sequences of {recipe.sequence_length} tokens |",
        f"| loss | {config.student.divergence} at temperature {recipe.temperature:g}, plus {config.student.ce_weight:g} of cross-entropy |",
        f"| optimiser steps | {plan.total_steps:,} of {config.student.global_batch_sequences} sequences |",
        f"| recipe | `{recipe.fingerprint}` |",
    ]
    if scores:
        lines += [
            "",
            "Held-out text, exact and dense:",
            "",
            "| model | cross-entropy | KL from the teacher | top-1 agreement | acceptance |",
        ]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {row.cross_entropy:.4f} | " + " | ".join(map(_figure, (row.kl, row.agreement, row.acceptance))) + " |"
            for name, row in scores.items()
        ]
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _run_id(first: StartRow) -> str:
    """The W&B id of a run that was given none: the same for as long as its journal keeps its first row."""
    return f"{first.recipe_fingerprint[:8]}-{round(first.time * 1000):x}"


@contextmanager
def _shown(journal: Path, views: Sequence[ProgressView | WandbView]) -> Iterator[None]:
    """Feed new journal rows to the views from a thread: whatever writes the journal, on whichever machine, is seen."""
    reader = JournalReader(journal)
    stopped = threading.Event()

    def feed() -> None:
        while True:
            last = stopped.wait(_FOLLOW_EVERY_S)
            for row in reader.new_rows():
                for view in views:
                    view.record(row)
            if last:
                return

    thread = threading.Thread(target=feed, name="journal-views", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        for view in views:
            view.close()
