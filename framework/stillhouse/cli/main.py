"""The command `stillhouse`: parse first, import what is heavy afterwards, turn what is raised into
one readable message and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted, 143 told to go by
SIGTERM (the same command goes on).
"""

import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from stillhouse import suggestions
from stillhouse.bench.verbs import bench_app
from stillhouse.cluster import machine, node
from stillhouse.cluster.environment import (
    cache_dir,
    forbid_pickled_code,
    learn_secrets,
    quieten,
    typed,
)
from stillhouse.cluster.ray_directory import base_directory, current_address, machine_directory
from stillhouse.errors import ConfigError, InterruptedRunError, StillhouseError, UserError
from stillhouse.model_path import source_of
from stillhouse.redaction import scrub
from stillhouse.terminal import say

if TYPE_CHECKING:
    from stillhouse.evaluation.scores import ModelName, Scores
    from stillhouse.pipeline import Plan


class Verbs(TyperGroup):
    """The verbs, and what becomes of the errors that they raise. A bug keeps its traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        dotted = next((arg for arg in args if re.match(r"--\w+\.\w+", arg)), None)
        if dotted is not None:
            name = dotted.lstrip("-").split("=")[0]
            ctx.fail(
                f"No such option: --{name}. Settings are given with --set, as lines of TOML: "
                f"--set '{name} = ...'"
            )
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(
                f"No such command '{args[0]}'. {suggestions.verb(args[0], list(self.commands))}"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        forbid_pickled_code()
        learn_secrets()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from None
        except InterruptedRunError as error:
            say(scrub(f"interrupted: {error}"), error=True)
            raise typer.Exit(143) from None
        except StillhouseError as error:
            say(scrub(f"error: {error}"), error=True)
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from None


app = typer.Typer(
    cls=Verbs,
    help="Distil large language models through exact compressed top-k logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="Look at, verify and tidy a chunk store.", no_args_is_help=True)
node_app = typer.Typer(
    help="Make this machine the head of a cluster, or a node of one.", no_args_is_help=True
)
app.add_typer(store_app, name="store")
app.add_typer(node_app, name="node")
app.add_typer(bench_app, name="bench")

Configs = Annotated[
    list[Path], typer.Argument(metavar="CONFIG", help="TOML files, merged left to right.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="'SECTION.KEY = VALUE'", help="Override one value: a line of TOML."
    ),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir", help="Where the run lives. Default: runs/ and the last config's name."
    ),
]
ExistingRun = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run.")]
StoreUrl = Annotated[
    str,
    typer.Argument(
        metavar="URL", help="A directory, or s3://, gs:// or az:// with bucket and prefix."
    ),
]

Resources = Annotated[
    list[str] | None,
    typer.Option("--resources", metavar="NAME=AMOUNT", help="What configs may ask for: teacher=8."),
]
Block = Annotated[bool, typer.Option("--block", help="Stay until Ray ends here, and fail then.")]


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=lambda wanted: _show_version(wanted),
            help="Show it.",
        ),
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(
            "--log-level",
            envvar="STILLHOUSE_LOG",
            help="From which level on logs in the run directory are kept.",
        ),
    ] = "info",
) -> None:
    """Distil large language models through exact compressed top-k logits."""
    logging.getLogger("stillhouse").setLevel(log_level.upper())


@app.command()
def init(
    teacher: Annotated[str, typer.Argument(help="The teacher: a hub name or a local directory.")],
    student: Annotated[str, typer.Argument(help="The student: a hub name or a local directory.")],
    dataset: Annotated[str, typer.Argument(help="A hub data set, local files, or 'stdlib'.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("distil.toml"),
) -> None:
    """Write a ten-line config for two models and a data set."""
    from stillhouse.cli.init import starter_toml

    text = starter_toml(teacher=teacher, student=student, dataset=dataset)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{out} exists already and stays as it is; name another file with --out"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot write {out}: {error.strerror}; name another file with --out"
        ) from None
    print(text, end="")
    named = shlex.quote(str(out))
    print(f"\nWritten to {out}. Next: `stillhouse check {named}`, then `stillhouse run {named}`.")


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where everything goes.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
) -> None:
    """Make a small teacher from Python's own standard library, distil it, and write the report."""
    _require_places()
    quieten()
    from stillhouse.cli import demo

    demo.run_demo(run_dir, overrides or (), cache_dir=cache_dir(), command=typed())


@app.command()
def check(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Validate everything that can be validated without a GPU, and say what a run would need."""
    plan = _plan(configs, overrides, run_dir, starts_ray=False)
    from stillhouse.cli.check import describe

    describe(plan)


@app.command()
def run(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Produce and train at the same time, evaluate, report. Run it again to go on where it
    stopped."""
    plan = _plan(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.run(plan, command=typed())
    _announce(plan.run_dir)


@app.command()
def produce(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Fill the store with the teacher's targets; no student."""
    plan = _plan(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.produce(plan, command=typed())


@app.command()
def train(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Train on a store that `produce` has filled, evaluate, report; no teacher pool."""
    plan = _plan(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.train(plan, command=typed())
    _announce(plan.run_dir)


@app.command(name="eval")
def evaluate(run_dir: ExistingRun) -> None:
    """Score teacher, student and control on the held-out split again."""
    plan = _existing(run_dir)
    from stillhouse import pipeline

    _print_scores(pipeline.evaluate_run(plan, command=typed()))


@app.command()
def report(run_dir: ExistingRun) -> None:
    """Write report.html from the run's journal."""
    from stillhouse.report import write_report

    print(write_report(run_dir))


@app.command()
def export(
    run_dir: ExistingRun,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
) -> None:
    """Write the student as a plain Hugging Face directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not empty; name a new directory")
    plan = _existing(run_dir)
    from stillhouse import pipeline

    steps = pipeline.export_run(plan, out)
    print(
        f"{out}: the student after {steps} steps; AutoModelForCausalLM.from_pretrained('{out}') "
        "opens it"
    )


@store_app.command(name="ls")
def store_ls(url: StoreUrl) -> None:
    """The recipes in a store, and how much of each is there."""
    from stillhouse.cli import store

    store.list_store(url)


@store_app.command(name="stat")
def store_stat(
    url: StoreUrl,
    fingerprint: Annotated[
        str,
        typer.Argument(metavar="[FINGERPRINT]", help="Its first digits; default: every recipe."),
    ] = "",
) -> None:
    """Every field of a recipe, and which of its chunks are missing."""
    from stillhouse.cli import store

    store.show_recipes(url, fingerprint)


@store_app.command(name="verify")
def store_verify(
    url: StoreUrl,
    quarantine: Annotated[
        bool,
        typer.Option(
            "--quarantine", help="Move damaged chunks away: `produce` then makes them again."
        ),
    ] = False,
    repair: Annotated[
        Path | None,
        typer.Option(
            "--repair",
            metavar="RUN_DIR|CONFIG",
            help="Make damaged chunks of this run's recipe again, with its teacher.",
        ),
    ] = None,
) -> None:
    """Read every chunk and check every bit of it; exit code 1 where any is damaged, and was not
    repaired."""
    from stillhouse.cli import store

    if repair is not None:
        store.repair(url, _existing(repair) if repair.is_dir() else _plan([repair], None, None))
        return
    store.verify(url, quarantine=quarantine)


@store_app.command(name="sweep")
def store_sweep(
    url: StoreUrl,
    older_than_hours: Annotated[
        float,
        typer.Option("--older-than-hours", min=0.0, help="A younger one may still be written."),
    ] = 24.0,
) -> None:
    """Remove what killed writers left behind, and name what lies in quarantine."""
    from stillhouse.cli import store

    store.tidy(url, older_than_s=older_than_hours * 3600)


@node_app.command(name="head")
def node_head(
    port: Annotated[int, typer.Option("--port", help="That nodes join at.")] = node.PORT,
    resources: Resources = None,
    autoscaling: Annotated[
        Path | None,
        typer.Option("--autoscaling", help="The config of `ray up`, on a head that it made."),
    ] = None,
    block: Block = False,
) -> None:
    """Start a cluster with this machine as its head; it lets in only who has its token."""
    asked = node.parse_resources(resources or ())
    _prepare_machine()
    node.protected(os.environ)  # before a directory is made for nothing
    directory = machine_directory(base_directory(os.environ))
    node.start(
        node.head(
            port=port, resources=asked, autoscaling=autoscaling, block=block, directory=directory
        ),
        os.environ,
    )
    if not block:
        print(
            f"The cluster is at {current_address(base_directory(os.environ))}; on this machine, "
            'cluster.address = "auto" finds it.'
        )


@node_app.command(name="join")
def node_join(
    address: Annotated[str, typer.Argument(metavar="HOST[:PORT]", help="The head.")],
    resources: Resources = None,
    block: Block = False,
    patience_s: Annotated[
        float, typer.Option("--patience", help="Seconds to wait for the head.")
    ] = 600.0,
) -> None:
    """Make this machine a node of a cluster; both have to have the same token."""
    _prepare_machine()
    node.protected(os.environ)  # rather said before the wait than after it
    node.wait_for_head(
        address,
        patience_s=patience_s,
        waiting=lambda words: print(words, file=sys.stderr, flush=True),
    )
    directory = machine_directory(base_directory(os.environ))
    node.start(
        node.join(
            address,
            resources=node.parse_resources(resources or ()),
            block=block,
            directory=directory,
        ),
        os.environ,
    )


@node_app.command(name="health")
def node_health() -> None:
    """Fail where this machine belongs to a cluster whose head does not answer."""
    node.require_health(base_directory(os.environ))


@node_app.command(name="token")
def node_token() -> None:
    """Make the token of a cluster; bring the file to all its machines."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or node.TOKEN_FILE).expanduser()
    node.make_token(path)
    print(
        f"{path} is the token. Every machine of the cluster needs a copy there, readable by its "
        "owner alone."
    )


def main() -> None:
    """The entry point."""
    try:
        app(prog_name="stillhouse")
    except Exception:  # a bug: its traceback may quote anything
        say(scrub(traceback.format_exc()), error=True)
        raise SystemExit(1) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"stillhouse {version('stillhouse')}")
        raise typer.Exit


def _require_places() -> None:
    """Before what takes seconds to import."""
    machine.require(machine.home())
    machine.require(machine.for_any_command(cache=cache_dir()))


def _prepare_machine() -> None:
    """For Ray's processes, which stay."""
    machine.require(machine.home())
    machine.require(machine.for_ray(os.environ, num_cpus=None))
    machine.raise_open_files()


def _plan(
    configs: list[Path],
    overrides: list[str] | None,
    run_dir: Path | None,
    *,
    starts_ray: bool = True,
) -> "Plan":
    from stillhouse.config import load_config

    config = load_config(configs, overrides or [])
    for model in (
        config.teacher.model,
        config.student.model,
        config.student.tokenizer or config.student.model,
    ):
        source_of(model)  # before seconds go into imports
    _require_places()
    if (
        starts_ray and config.cluster.address is None
    ):  # said now rather than once the corpus is tokenised
        machine.require(machine.for_ray(os.environ, num_cpus=config.cluster.num_cpus))
    quieten()
    from stillhouse import pipeline

    return pipeline.make_plan(
        config, run_dir=run_dir or Path("runs") / configs[-1].stem, cache_dir=cache_dir()
    )


def _existing(run_dir: Path) -> "Plan":
    _require_places()
    quieten()
    from stillhouse import pipeline

    return pipeline.open_run(run_dir, cache_dir=cache_dir())


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
