"""The verbs of a run: demo, check, run, produce, train, eval, report, export, push."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import api
from stillhouse.cluster import machine
from stillhouse.cluster.environment import cache_dir, typed

if TYPE_CHECKING:
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
    """Validate everything that can be validated without a GPU, and say what a run, or `generate` of
    a config with prompts and a writer, would need."""
    from stillhouse.config.generate import is_of_generate
    from stillhouse.config.reading import read_values

    if is_of_generate(read_values(configs, overrides or ())):
        from stillhouse.cli.generate import planned_generation

        generation = planned_generation(configs, overrides, run_dir, starts_ray=False)
        from stillhouse.cli.check_generation import describe_generation

        describe_generation(generation)
        return
    plan = planned(configs, overrides, run_dir, starts_ray=False)
    from stillhouse.cli.check import describe

    describe(plan)


def run(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Produce and train at the same time, evaluate, report. The same command resumes a run."""
    plan = planned(configs, overrides, run_dir)
    from stillhouse import pipeline
    from stillhouse.cli.closing import say_what_came_of_it

    say_what_came_of_it(plan, pipeline.run(plan, command=typed()))


def produce(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Fill the store with the teacher's targets; no student."""
    plan = planned(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.produce(plan, command=typed())


def train(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Train on a store that `produce` has filled, evaluate, report; no teacher pool."""
    plan = planned(configs, overrides, run_dir)
    from stillhouse import pipeline
    from stillhouse.cli.closing import say_what_came_of_it

    say_what_came_of_it(plan, pipeline.train(plan, command=typed()))


def evaluate(run_dir: ExistingRun) -> None:
    """Score teacher, student and control on the held-out split again."""
    plan = api.open_run(run_dir)
    from stillhouse import pipeline
    from stillhouse.cli.closing import print_scores

    print_scores(plan.run_dir, pipeline.evaluate_run(plan, command=typed()))


def report(run_dir: ExistingRun) -> None:
    """Write report.html from the journal of a run, or of `generate`."""
    from stillhouse.report import write_report

    print(write_report(run_dir))


def export(
    run_dir: ExistingRun,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    best: Annotated[
        bool, typer.Option("--best", help="The student with the lowest held-out KL, not the last.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a student with LoRA: its adapter alone.")
    ] = False,
) -> None:
    """Write the student as a plain Hugging Face directory."""
    steps = api.export(run_dir, out, best=best, adapter=adapter)
    opener = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    print(f"{out}: the student after {steps} steps; {opener}.from_pretrained('{out}') opens it")


def push(
    run_dir: ExistingRun,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is new.")
    ] = False,
) -> None:
    """Export the student to the Hugging Face hub, with its model card."""
    print(api.push(run_dir, name, private=private))


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
