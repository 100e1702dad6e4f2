"""The command `stillhouse`: it parses first, imports what is heavy afterwards, and turns an error
into one readable message and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted by Ctrl-C, 143 stopped
by SIGTERM. After the last two, the same command resumes the run.
"""

import logging
import re
import sys
import traceback
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from stillhouse import suggestions
from stillhouse.bench.verbs import bench_app
from stillhouse.cli import config_verbs, run_verbs
from stillhouse.cli.generate import generate
from stillhouse.cli.grade import grade
from stillhouse.cli.node_verbs import node_app
from stillhouse.cli.store_verbs import store_app
from stillhouse.cluster.environment import forbid_pickled_code, learn_secrets
from stillhouse.errors import InterruptedRunError, StillhouseError, UserError
from stillhouse.redaction import scrub
from stillhouse.terminal import say


class Verbs(TyperGroup):
    """The verbs, and the messages and exit codes of their errors. A bug keeps its traceback."""

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
    help="Distil large language models at cluster scale.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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
            help="The lowest level of messages in the log files of a run directory.",
        ),
    ] = "info",
) -> None:
    """Distil large language models at cluster scale."""
    logging.getLogger("stillhouse").setLevel(log_level.upper())


app.command()(config_verbs.init)
app.command()(run_verbs.demo)
app.command()(run_verbs.check)
app.command()(run_verbs.run)
app.command()(generate)
app.command()(grade)
app.command()(run_verbs.produce)
app.command()(run_verbs.train)
app.command(name="eval")(run_verbs.evaluate)
app.command()(run_verbs.report)
app.command()(run_verbs.export)
app.command()(run_verbs.push)
app.command()(config_verbs.settings)
app.command()(config_verbs.schema)
app.add_typer(store_app, name="store")
app.add_typer(node_app, name="node")
app.add_typer(bench_app, name="bench")


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
