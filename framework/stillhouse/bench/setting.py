"""What the pipeline benchmark times: the demo's two models with random weights, whose speed is that
of trained ones, on the files of Python's standard library.

Two teachers and one student rank with one thread each share two cores; what they are compared with
has two threads on the same cores.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from stillhouse.bench.in_turn import Form, Lesson
from stillhouse.config import Config, parse_config
from stillhouse.errors import ConfigError
from stillhouse.pipeline import Plan, make_plan
from stillhouse.pipeline.toy import Sizes, make_models
from stillhouse.sequences.source import whole

NUM_CORES = 2
# shuffle windows that teachers may be ahead: without a limit they would finish before the student
# has begun
_WINDOWS_AHEAD = 3
_DOCUMENTS_PER_STEP = 4  # files: two or three give the 16 sequences of a step


@contextmanager
def on_two_cores() -> Iterator[None]:
    """Limit this process, and all that it starts, to two cores, so that the figures do not depend
    on how many more there are. Raises ConfigError where there are fewer."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    if len(before) < NUM_CORES:
        raise ConfigError(
            f"this process may use {len(before)} core(s), but the benchmark is of {NUM_CORES}; "
            "run it where there are more"
        )
    os.sched_setaffinity(0, sorted(before)[:NUM_CORES])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def prepare(folder: Path, *, num_steps: int) -> Config:
    """The config of so many steps, and its two models, made in the existing directory `folder`."""
    # the config
    models = folder / "models"
    config = parse_config(
        {
            "corpus": {
                "dataset": "stdlib",
                "sequence_length": 256,
                "max_documents": _DOCUMENTS_PER_STEP * num_steps,
                "heldout_sequences": 8,
            },
            "teacher": {
                "model": str(models / "teacher"),
                "dtype": "float32",
                "device": "cpu",
                "num_cpus": 0.5,
                "min_replicas": 2,
                "max_replicas": 2,
                "batch_sequences": 8,
            },
            "store": {"chunk_sequences": 16},
            "student": {
                "model": str(models / "student"),
                "init": "config",
                "dtype": "float32",
                "device": "cpu",
                "num_cpus": 0.5,
                "global_batch_sequences": 16,
                "micro_batch_sequences": 8,
                "max_steps": num_steps,
                "checkpoint_every_steps": 100,
            },
            "cluster": {"notices": "off"},
            "tracking": {"wandb": "off"},
        }
    )

    # the models
    models.mkdir()
    untrained, quiet = replace(Sizes(), num_steps=0), Console(quiet=True)
    make_models(models, config.corpus, untrained, cache_dir=folder / "cache", console=quiet)
    return config


def streaming(config: Config, folder: Path) -> Plan:
    """A run on a store of its own, which is empty, with teachers held closely ahead of the
    student."""
    store = config.store.model_copy(update={"url": str(folder / "store")})
    config = config.model_copy(update={"store": store})
    plan = make_plan(config, run_dir=folder / "run", cache_dir=folder.parent / "cache")
    if plan.total_steps > plan.order.steps_per_epoch:
        raise ConfigError(
            f"{plan.total_steps} steps are more than the {plan.order.steps_per_epoch} of one "
            "epoch; ask for fewer --steps"
        )
    window_chunks = _WINDOWS_AHEAD * plan.config.student.shuffle_window_chunks
    window_bytes = math.ceil(window_chunks * plan.bytes_per_chunk)
    store = plan.config.store.model_copy(update={"window_bytes": window_bytes})
    return replace(plan, config=plan.config.model_copy(update={"store": store}))


def cached(run: Plan) -> Plan:
    """The same training on the store that `run` has filled, in a run directory of its own: no
    teachers, so the student has both threads."""
    cluster = run.config.cluster.model_copy(update={"threads": NUM_CORES})
    config = run.config.model_copy(update={"cluster": cluster})
    return replace(run, config=config, run_dir=run.run_dir.with_name("cached"))


def lesson(plan: Plan, form: Form, *, num_steps: int) -> Lesson:
    """The first steps of the same training, for one process that does teacher and student in
    turn."""
    sequences = np.concatenate([plan.order.sequences(step) for step in range(num_steps)])
    rows = whole(plan.sources.train).select(sequences)
    return Lesson(
        form, plan.config.teacher, plan.config.student, plan.recipe, rows, threads=NUM_CORES
    )
