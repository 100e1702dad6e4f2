"""The verbs of a config: init, settings, schema."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.errors import ConfigError

_PIPE_WIDTH = 1000  # a line for each setting, for grep


def init(
    teacher: Annotated[str, typer.Argument(help="The teacher: a hub name or a local directory.")],
    student: Annotated[str, typer.Argument(help="The student: a hub name or a local directory.")],
    dataset: Annotated[str, typer.Argument(help="A hub data set, local files, or 'stdlib'.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("distil.toml"),
) -> None:
    """Write a ten-line config for two models and a data set, and its schema for editors."""
    from stillhouse.cli.init import SCHEMA_NAME, schema_json, starter_file

    text = starter_file(teacher=teacher, student=student, dataset=dataset)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
        out.with_name(SCHEMA_NAME).write_text(schema_json(), encoding="utf-8")
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
    print(f"\nWritten to {out}, with {SCHEMA_NAME} for editors beside it.")
    print(f"Next: `stillhouse check {named}`, then `stillhouse run {named}`.")


def settings(
    word: Annotated[
        str, typer.Argument(metavar="[WORD]", help="A section, or a word of a name or description.")
    ] = "",
) -> None:
    """List the settings of a config: name, type and range, default, description."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stillhouse.config.settings import settings_matching

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("setting", "type and range", "default", "description"):
        table.add_column(heading, overflow="fold")
    for each in settings_matching(word):
        table.add_row(
            f"{each.section}.{each.name}", each.kind, each.default, Text(each.description)
        )
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False).print(table)


def schema() -> None:
    """Print the JSON Schema of a config, for editors and other tools."""
    from stillhouse.cli.init import schema_json

    print(schema_json(), end="")
