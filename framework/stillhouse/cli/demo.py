"""`stillhouse demo`: a teacher trained on Python's own standard library, and a whole run that
distils it. It needs no network, no GPU and no data set.

The two models are written atomically, so a demo that was stopped resumes. The teacher learns from
the corpus's training split: no model is trained on the held-out one.
"""

from collections.abc import Iterable
from pathlib import Path
from time import time

import torch
from rich.console import Console

from stillhouse import pipeline
from stillhouse.atomic import remove_tree, whole_directory
from stillhouse.cli.closing import verdict_of
from stillhouse.cluster.machine import require
from stillhouse.cluster.session import lacks
from stillhouse.config import Config
from stillhouse.pipeline.holder import Holder
from stillhouse.pipeline.ownership import locked
from stillhouse.pipeline.toy import Sizes, demo_config, make_models
from stillhouse.terminal import printable

_MAX_THREADS = 4  # with more, matrices this small are slower


def run_demo(
    run_dir: Path,
    overrides: Iterable[str] = (),
    *,
    cache_dir: Path,
    command: str = "stillhouse demo",
) -> None:
    """Make the models, unless they are there; plan and run their distillation; print the verdict.

    Everything but the tokenised corpus is written to `run_dir`. `command` is what the user typed,
    for the journal. Raises what `pipeline.make_plan` and `pipeline.run` raise.
    """
    # the models
    console = Console(highlight=False, markup=False, emoji=False)
    console.soft_wrap = not console.is_terminal
    config = demo_config(run_dir, overrides)
    require(lacks(config.cluster))  # before a teacher is made for nothing
    console.print(_opening(config, run_dir))
    console.print("It takes some minutes. Stop it when you like: the same command resumes it.")
    with locked(Holder.here(command, run_dir, now=time())):
        if not (run_dir / "models").exists():
            torch.set_num_threads(min(_MAX_THREADS, torch.get_num_threads()))
            with whole_directory(run_dir / "models") as draft:
                make_models(draft, config.corpus, Sizes(), cache_dir=cache_dir, console=console)

    # their distillation
    console.print(_third_step(config))
    plan = pipeline.make_plan(config, run_dir=run_dir, cache_dir=cache_dir)
    pipeline.run(plan, command=command)
    student = run_dir / "export" / "student"
    remove_tree(student)  # of an earlier demo in this directory
    pipeline.export_run(plan, student)

    # what came of it
    console.print(printable(f"\n{verdict_of(run_dir)}\n"))
    where = f"The report:  {run_dir / 'report.html'}\nThe student: {student}"
    console.print(printable(where), soft_wrap=True)


def _opening(config: Config, run_dir: Path) -> str:
    """What is run, and where its files are."""
    who = (
        "A teacher, a student and a control"
        if config.evaluate.control
        else "A teacher and a student"
    )
    if config.cluster.address is None:
        return f"{who} on this machine alone; everything is written to {run_dir}."
    return (
        f"{who} on the cluster; the run is written to {run_dir}, its chunks to {config.store.url}."
    )


def _third_step(config: Config) -> str:
    """What the pipeline does, in plain words; the first two steps make the models."""
    draws = (
        f" and {config.target.tail_draws} draws from the rest" if config.target.tail_draws else ""
    )
    control = (
        " Then a control, the same student, learns from the text alone."
        if config.evaluate.control
        else ""
    )
    return (
        f"\n3. {config.teacher.max_replicas} teachers on Ray write the {config.target.k} "
        f"likeliest next tokens{draws} at each place"
        " to a store;"
        f" a student that knows nothing learns from it as it fills.{control} All are scored on "
        "text that none of them has seen.\n"
    )
