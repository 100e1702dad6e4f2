"""The command `stillhouse`, called in this process: its exit code and what it wrote."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from stillhouse.cli.main import app
from stillhouse.pipeline import Plan


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def stillhouse(*arguments: str | Path, cache: Path | None = None) -> Outcome:
    """Run the command in a wide window that is no terminal; what it sets in the environment ends
    with it."""
    before = dict(os.environ)
    os.environ |= {"COLUMNS": "1000"} | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            app([str(argument) for argument in arguments], prog_name="stillhouse")
    except SystemExit as end:
        return Outcome(
            end.code if isinstance(end.code, int) else int(end.code is not None),
            out.getvalue(),
            err.getvalue(),
        )
    finally:
        os.environ.clear()
        os.environ.update(before)
    raise AssertionError("a command ends with SystemExit")


def as_toml(values: dict[str, dict[str, Any]]) -> str:
    """Sections of text, numbers, booleans and tables of these, as TOML."""
    lines = []
    for name, section in values.items():
        lines += [f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in section.items())]
    return "\n".join(lines) + "\n"


def config_of(plan: Plan) -> Path:
    """The plan's config in a file beside its run directory."""
    path = plan.run_dir.with_suffix(".toml")
    values = plan.config.model_dump(mode="json", exclude_none=True)
    path.write_text(
        as_toml(
            {
                name: {key: value for key, value in table.items() if value != []}
                for name, table in values.items()
            }
        )
    )
    return path


def toml_value(value: str | float | bool | dict[str, Any]) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) else str(value)
