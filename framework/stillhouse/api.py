"""A run from Python: plan, run, produce, train, evaluate, export.

    config = stillhouse.load_config("distil.toml")
    plan = stillhouse.plan(config, run_dir="runs/mine")
    scores = stillhouse.run(plan)  # the same call resumes a run that was stopped
    stillhouse.export(plan, "student")

Each function does what the command of its name does, and raises what the command prints: a
UserError for a mistake that can be mended, a RunError for a run that failed.

Importing this module loads nothing heavy; the first call does.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.cluster import environment, machine
from stillhouse.errors import ConfigError
from stillhouse.model_path import source_of

if TYPE_CHECKING:
    from stillhouse.config import Config
    from stillhouse.evaluation.scores import ModelName
    from stillhouse.losses.score import Scores
    from stillhouse.pipeline import Plan


def plan(config: "Config", *, run_dir: str | Path, cache_dir: str | Path | None = None) -> "Plan":
    """Plan a run: read the tokenizers, tokenise the corpus once, name the recipe. No model is
    loaded and nothing is written but the cache.

    The plan tells what a run will do: `recipe`, `chunks`, `total_steps`, `store`. `run_dir` is the
    directory of the run: its journal, checkpoints and report. `cache_dir` holds tokenised corpora
    between runs (None: stillhouse/ in the user's cache directory).

    Raises ConfigError, ModelError, CorpusError or CacheError for what cannot be used.
    """
    student = config.student
    for model in (config.teacher.model, student.model, student.tokenizer or student.model):
        source_of(model)  # a wrong path is found before seconds go into imports
    cache = environment.cache_dir() if cache_dir is None else Path(cache_dir)
    prepare_process(cache)
    from stillhouse import pipeline

    return pipeline.make_plan(config, run_dir=Path(run_dir), cache_dir=cache)


def run(plan: "Plan") -> "dict[ModelName, Scores]":
    """Produce and train at the same time, evaluate, write report.html.

    Returns the scores of teacher, student and control on the held-out text: `cross_entropy` and
    `kl` from the teacher in nats, `agreement`, `acceptance`, `calibration_error`, `num_tokens`.
    In a run directory that has been used before it resumes: chunks in the store are not made again,
    and training continues from the newest checkpoint.

    Raises RecipeError where the run directory belongs to another run, and what stopped the run.
    """
    from stillhouse import pipeline

    return pipeline.run(plan, command="stillhouse.run(plan)")


def produce(plan: "Plan") -> None:
    """Fill the store with the teacher's targets; no student. Chunks that are there are kept."""
    from stillhouse import pipeline

    pipeline.produce(plan, command="stillhouse.produce(plan)")


def train(plan: "Plan") -> "dict[ModelName, Scores]":
    """Train on a store that `produce` has filled, evaluate, write report.html; no teacher pool.
    Returns scores as `run` does. Raises StoreError where chunks are missing."""
    from stillhouse import pipeline

    return pipeline.train(plan, command="stillhouse.train(plan)")


def evaluate(run: "Plan | str | Path") -> "dict[ModelName, Scores]":
    """Score teacher, student and control of a run again, on its held-out text. `run` is a plan, or
    the directory of a run. Raises RecipeError where the directory is no run's."""
    plan = _opened(run)
    from stillhouse import pipeline

    return pipeline.evaluate_run(plan, command="stillhouse.evaluate(plan)")


def export(
    run: "Plan | str | Path", out: str | Path, *, best: bool = False, adapter: bool = False
) -> int:
    """Write the student of a run as a plain Hugging Face directory with a model card. Returns the
    optimiser steps behind it.

    `run` is a plan, or the directory of a run; `out` is a directory that is new or empty. `best`
    writes the student of the step with the lowest held-out KL, which evaluate.keep_best keeps; else
    the newest is written. `adapter` writes the adapters of a student with LoRA alone, for peft;
    else they are merged. Raises ConfigError where `out` is neither, no best one was kept or there
    are no adapters, CheckpointError where the run has no checkpoint.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not empty; name a new directory")
    plan = _opened(run)
    from stillhouse import pipeline

    return pipeline.export_run(plan, out, best=best, adapter=adapter)


def push(run: "Plan | str | Path", name: str, *, private: bool = False) -> str:
    """Export the student of a run to the hub's repository `owner/name`, which is made where it does
    not exist; returns its address.

    The token is that of `hf auth login`, or HF_TOKEN. Raises ModelError without a token and where
    the hub refuses it, CheckpointError where the run has no checkpoint.
    """
    plan = _opened(run)
    from stillhouse import pipeline

    return pipeline.push_run(plan, name, private=private)


def open_run(run_dir: str | Path, *, cache_dir: str | Path | None = None) -> "Plan":
    """The plan of a run directory that exists already. Raises RecipeError where it is no run's."""
    cache = environment.cache_dir() if cache_dir is None else Path(cache_dir)
    prepare_process(cache)
    from stillhouse import pipeline

    return pipeline.open_run(Path(run_dir), cache_dir=cache)


def prepare_process(cache_dir: Path) -> None:
    """Settle this process before a heavy library is imported: torch.load runs no code of a pickle,
    secrets are kept out of logs, libraries are quiet. Raises ConfigError where the machine lacks
    something, such as a cache directory that can be written."""
    environment.forbid_pickled_code()
    environment.learn_secrets()
    machine.require(machine.home())
    machine.require(machine.for_any_command(cache=cache_dir))
    environment.quieten()


def _opened(run: "Plan | str | Path") -> "Plan":
    return open_run(run) if isinstance(run, str | Path) else run
