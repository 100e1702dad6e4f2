"""The run directory: which run it belongs to, and what may change when it is used again.

config.json  recipe.json     what was asked
journal.jsonl  logs/  lock   what happened, and which command uses it now
student/                     the model that a student is cut to, before its first step
bad_rows.jsonl               rows of the corpus that were skipped; absent where there are none
samples.json                 of a corpus that a model wrote: counts, and samples for the report
checkpoints/                 the commits, unless student.checkpoint_url names another place
wandb/  report.html          views of the journal
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from stillhouse import atomic
from stillhouse.config import (
    Config,
    StudentSection,
    parse_config,
    resolved_json,
    with_absolute_inputs,
)
from stillhouse.errors import ConfigError, RecipeError
from stillhouse.sealed import opened, sealed
from stillhouse.sequences.source import Part
from stillhouse.store import ChunkStore, Recipe, differences, parse_recipe
from stillhouse.store.consumers import consumer_name, leave
from stillhouse.store.explain import explain
from stillhouse.student.job import resume_location
from stillhouse.tracking.samples import FILE_NAME as SAMPLES_NAME
from stillhouse.tracking.samples import samples_file

_log = logging.getLogger(__name__)

# The settings that may differ when a run directory is used again. All others decide a target, a
# batch or a gradient.
_PLACEMENT = {
    *("device", "num_cpus", "num_gpus", "gpu_memory_gb", "resources"),
    *("max_failures", "block_tokens"),
}
_MAY_CHANGE: Mapping[str, set[str]] = {
    "student": _PLACEMENT
    | {"learning_rate", "min_learning_rate", "warmup_steps", "epochs", "max_steps"}
    | {"schedule", "decay_steps", "overlap_comm", "activation_checkpointing_every"}
    | {"tail_as_bucket"}  # it lets a training begin, and decides no weight
    | {"num_workers", "min_workers", "watchdog_s", "regroup_s", "prefetch_batches", "offload_path"}
    | {"checkpoint_every_steps", "checkpoint_url", "keep_checkpoints", "activation_checkpointing"},
    "teacher": _PLACEMENT
    | {"engine", "python", "vllm", "openai", "rollouts", "compile", "pipeline"}
    | {"min_replicas", "max_replicas", "batch_sequences"}
    | {"max_set_aside", "lease_timeout_s", "watchdog_s"},
    "store": {"url", "window_bytes", "retain"},
}
_MAY_CHANGE_WHOLLY = frozenset({"evaluate", "tracking", "cluster"})


def config_of(run_dir: Path) -> Config:
    """The resolved config that a run directory was last used with.

    Raises RecipeError where it is no run directory, ConfigError where its config is damaged.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise RecipeError(
            f"{run_dir} is not a run directory: it has no config.json; name the --run-dir of an "
            "earlier run"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = values if values.get("xxh3") is None else opened(values)
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); remove it, and start the run again with its own config "
            "file"
        ) from None
    try:
        return parse_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _sealed(config: Config) -> bytes:
    """The bytes of config.json: every value, and their checksum."""
    return (json.dumps(sealed(json.loads(resolved_json(config))), indent=2) + "\n").encode()


def changes_that_matter(before: Config, after: Config) -> list[str]:
    """The differences that a resumed run may not have, each as 'section.key: before -> after'."""
    old, new = with_absolute_inputs(before), with_absolute_inputs(after)
    return [
        f"{section}.{key}: {old[section][key]!r} -> {new[section][key]!r}"
        for section in old
        if section not in _MAY_CHANGE_WHOLLY
        for key in old[section]
        if key not in _MAY_CHANGE.get(section, set()) and old[section][key] != new[section][key]
    ]


def changes_since(run_dir: Path, *, config: Config, recipe: Recipe) -> list[str]:
    """The differences that keep a run from going on in this directory; none where there is no run
    yet."""
    config_path, recipe_path = run_dir / "config.json", run_dir / "recipe.json"
    changes = changes_that_matter(config_of(run_dir), config) if config_path.exists() else []
    if not changes and recipe_path.exists():
        changes = differences(
            parse_recipe(recipe_path.read_bytes(), where=str(recipe_path)), recipe
        )
    return changes


def require_same_run(run_dir: Path, *, config: Config, recipe: Recipe) -> None:
    """Raise RecipeError where the directory belongs to another run. Nothing is written."""
    changes = changes_since(run_dir, config=config, recipe=recipe)
    if changes:
        raise RecipeError(
            f"{run_dir} belongs to another run; these differ:\n"
            + "\n".join(f"  - {change}" for change in changes)
            + "\nSet them back to go on with it, or name another --run-dir."
        )


def claim(run_dir: Path, *, config: Config, recipe: Recipe) -> Config | None:
    """Write config.json and recipe.json. Returns the config that the directory was last used with.
    Raises StoreError where they cannot be written."""
    before = config_of(run_dir) if (run_dir / "config.json").exists() else None
    files = {"recipe.json": recipe.canonical_json(), "config.json": _sealed(config)}
    try:
        for name, data in files.items():
            atomic.replace(run_dir / name, data)
    except OSError as error:
        raise explain(error, doing="write config.json and recipe.json", url=str(run_dir)) from error
    return before


def keep_account(run_dir: Path, parts: Sequence[Part]) -> None:
    """Log what became of the data sets of the corpus. Write bad_rows.jsonl where rows of them were
    skipped, and samples.json where a model wrote them. Raises StoreError where these cannot be
    written."""
    for part in parts:
        for line in part.account.lines():
            _log.info("corpus: %s: %s", part.name, line)
    bad = b"".join(part.account.bad_rows_file() for part in parts)
    samples = {part.name: found for part in parts if (found := part.account.samples) is not None}
    _keep(run_dir / "bad_rows.jsonl", bad)
    _keep(run_dir / SAMPLES_NAME, samples_file(samples) if samples else b"")
    if bad:
        num_bad = sum(len(part.account.bad_rows) for part in parts)
        path = run_dir / "bad_rows.jsonl"
        _log.warning("rows of the corpus are skipped: %d, which %s lists", num_bad, path)


def _keep(path: Path, data: bytes) -> None:
    """The file, or none where there is nothing to be in it."""
    if not data:
        path.unlink(missing_ok=True)
        return
    try:
        atomic.replace(path, data)
    except OSError as error:
        raise explain(error, doing=f"write {path.name}", url=str(path.parent)) from error


def leave_former_place(
    run_dir: Path, store: ChunkStore, *, before: StudentSection, now: StudentSection
) -> None:
    """Take back the consumers of a run whose place of checkpoints has changed, and their names with
    it: the store would keep every chunk for them."""
    former = resume_location(before, run_dir)
    if former != resume_location(now, run_dir):
        for role in ("student", "control"):
            leave(store, consumer_name(former, role))
