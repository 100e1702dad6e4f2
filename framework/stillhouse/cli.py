"""The command `stillhouse`: parse first, import what is heavy afterwards, turn errors into one readable message and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted (run the same command again to go on).
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse.errors import ConfigError, StillhouseError, UserError

if TYPE_CHECKING:
    from stillhouse.pipeline import Plan

app = typer.Typer(
    help="Distil large language models through exact compressed top-k logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="Look at, verify and tidy a chunk store.", no_args_is_help=True)
app.add_typer(store_app, name="store")

Configs = Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="TOML files, merged left to right.")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="'SECTION.KEY = VALUE'", help="Override one value, as a line of TOML.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Where the run lives; default: runs/ and the last config's name.")]
ExistingRun = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run.")]
StoreUrl = Annotated[str, typer.Argument(metavar="URL", help="A directory, or s3://, gs:// or az:// with bucket and prefix.")]


@app.command()
def init(
    teacher: Annotated[str, typer.Argument(help="The teacher: a hub name or a local directory.")],
    student: Annotated[str, typer.Argument(help="The student: a hub name or a local directory.")],
    dataset: Annotated[str, typer.Argument(help="A hub data set, local files, or 'stdlib'.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("distil.toml"),
) -> None:
    """Write a ten-line config for two models and a data set."""
    from stillhouse.config import starter_toml

    text = starter_toml(teacher=teacher, student=student, dataset=dataset)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{out} exists already; name another file with --out") from None
    print(text, end="")
    print(f"\nWritten to {out}. Next: `stillhouse check {out}`, then `stillhouse run {out}`.")


@app.command()
def demo(run_dir: Annotated[Path, typer.Option("--run-dir", help="Where everything goes.")] = Path("runs/demo")) -> None:
    """Make a small teacher from Python's own standard library, distil it, and write the report."""
    from stillhouse import demo

    demo.run_demo(run_dir, cache_dir=_cache_dir())


@app.command()
def check(configs: Configs, overrides: Overrides = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Validate everything that can be validated without a GPU, and say what a run would need."""
    from stillhouse.check import describe

    describe(_plan(configs, overrides, run_dir))


@app.command()
def run(configs: Configs, overrides: Overrides = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Produce and train at the same time, evaluate, report. Run it again to go on where it stopped."""
    from stillhouse import pipeline

    made = _plan(configs, overrides, run_dir)
    pipeline.run(made)
    _announce(made.run_dir)


@app.command()
def produce(configs: Configs, overrides: Overrides = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Fill the store with the teacher's targets; no student."""
    from stillhouse import pipeline

    pipeline.produce(_plan(configs, overrides, run_dir))


@app.command()
def train(configs: Configs, overrides: Overrides = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Train on a store that `produce` has filled, evaluate, report; no teacher pool."""
    from stillhouse import pipeline

    made = _plan(configs, overrides, run_dir)
    pipeline.train(made)
    _announce(made.run_dir)


@app.command(name="eval")
def evaluate(run_dir: ExistingRun) -> None:
    """Score teacher, student and control on the held-out split again."""
    from stillhouse import pipeline
    from stillhouse.report import score_table

    scores = pipeline.evaluate_run(pipeline.open_run(run_dir, cache_dir=_cache_dir()))
    print(score_table(scores))


@app.command()
def report(run_dir: ExistingRun) -> None:
    """Write report.html from the run's journal."""
    from stillhouse.report import write_report

    print(write_report(run_dir))


@app.command()
def export(run_dir: ExistingRun, out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")]) -> None:
    """Write the student as a plain Hugging Face directory."""
    from stillhouse import pipeline

    steps = pipeline.export_run(pipeline.open_run(run_dir, cache_dir=_cache_dir()), out)
    print(f"{out}: the student after {steps} steps; AutoModelForCausalLM.from_pretrained('{out}') opens it")


def main() -> None:
    """The entry point: run a verb, and turn what it raises into one message and an exit code."""
    try:
        app(standalone_mode=False)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except typer.TyperException as error:
        sys.exit(error)
    except StillhouseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


def _plan(configs: list[Path], overrides: list[str], run_dir: Path | None) -> "Plan":
    from stillhouse.config import load_config

    config = load_config(configs, overrides)
    _quieten()
    from stillhouse import pipeline

    return pipeline.plan(config, run_dir=run_dir or Path("runs") / configs[-1].stem, cache_dir=_cache_dir())
