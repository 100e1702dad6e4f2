"""The verbs of a run: demo, check, run, produce, train, eval, report, export."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import api
from stillhouse.cluster import machine
from stillhouse.cluster.environment import cache_dir, typed

if TYPE_CHECKING:
    from stillhouse.evaluation.scores import ModelName
    from stillhouse.losses.score import Scores
    from stillhouse.pipeline import Plan

Configs = Annotated[
    list[Path], typer.Argument(metavar="CONFIG", help="TOML files, merged left to right.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="'SECTION.KEY = VALUE'",
        help="Override one setting: a line of TOML. `stillhouse settings` lists them.",
    ),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir", help="The run's directory. Default: runs/ and the last config's name."
    ),
]
ExistingRun = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run.")]


def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The demo's directory.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
) -> None:
    """Make a small teacher from Python's own standard library, distil it, and write the report."""
    api.prepare_process(cache_dir())
    from stillhouse.cli import demo

    demo.run_demo(run_dir, overrides or (), cache_dir=cache_dir(), command=typed())


def check(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Validate everything that can be validated without a GPU, and say what a run would need."""
    plan = planned(configs, overrides, run_dir, starts_ray=False)
    from stillhouse.cli.check import describe

    describe(plan)


def run(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Produce and train at the same time, evaluate, report. The same command resumes a run."""
    plan = planned(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.run(plan, command=typed())
    _announce(plan.run_dir)


def produce(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Fill the store with the teacher's targets; no student."""
    plan = planned(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.produce(plan, command=typed())


def train(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Train on a store that `produce` has filled, evaluate, report; no teacher pool."""
    plan = planned(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.train(plan, command=typed())
    _announce(plan.run_dir)


def evaluate(run_dir: ExistingRun) -> None:
    """Score teacher, student and control on the held-out split again."""
    plan = api.open_run(run_dir)
    from stillhouse import pipeline

    _print_scores(pipeline.evaluate_run(plan, command=typed()))


def report(run_dir: ExistingRun) -> None:
    """Write report.html from the run's journal."""
    from stillhouse.report import write_report

    print(write_report(run_dir))


def export(
    run_dir: ExistingRun,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
) -> None:
    """Write the student as a plain Hugging Face directory."""
    steps = api.export(run_dir, out)
    print(
        f"{out}: the student after {steps} steps; AutoModelForCausalLM.from_pretrained('{out}') "
        "opens it"
    )


def planned(
    configs: list[Path],
    overrides: list[str] | None = None,
    run_dir: Path | None = None,
    *,
    starts_ray: bool = True,
) -> "Plan":
    """The plan of config files and --set values. Mistakes that cost no import are found first."""
    from stillhouse.config import load_config

    config = load_config(configs, overrides or ())
    if starts_ray and config.cluster.address is None:
        machine.require(machine.for_ray(os.environ, num_cpus=config.cluster.num_cpus))
    return api.plan(config, run_dir=run_dir or Path("runs") / configs[-1].stem)


def _announce(run_dir: Path) -> None:
    named = shlex.quote(str(run_dir))
    print(
        f"{run_dir / 'report.html'} tells the whole run; `stillhouse export {named} OUT` writes "
        "the student as a Hugging Face model"
    )


def _print_scores(scores: "Mapping[ModelName, Scores]") -> None:
    from rich.console import Console
    from rich.table import Table

    num_tokens = max(score.num_tokens for score in scores.values())
    table = Table(
        box=None,
        header_style="bold",
        caption=f"means over {num_tokens:,} held-out tokens, both models dense; nats",
    )
    table.add_column("model")
    for heading in ("cross-entropy", "KL from teacher", "agreement", "acceptance", "calibration"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, score in scores.items():
        compared = [
            f"{value:.4f}" if name != "teacher" else ""
            for value in (score.kl, score.agreement, score.acceptance)
        ]
        table.add_row(
            name, f"{score.cross_entropy:.4f}", *compared, f"{score.calibration_error:.4f}"
        )
    Console().print(table)
