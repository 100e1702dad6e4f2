"""Reading a configuration: TOML files merged left to right, then overrides; messages that name the
setting, what was found and what is wanted."""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from stillhouse import suggestions
from stillhouse.config.fields import TABLE, WORD, Section, shown
from stillhouse.config.paths import paths_from
from stillhouse.config.sections import Config, names_by_section
from stillhouse.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)


def load_config(
    paths: str | Path | Iterable[str | Path], overrides: str | Iterable[str] = ()
) -> Config:
    """Read one or more TOML files, merged left to right, then `section.key = value` overrides, each
    a line of TOML.

    Relative paths in a file are relative to that file (see docs/settings.md), those of overrides to
    the current directory.

    Raises ConfigError that names the file, the setting and, for an unknown name, the nearest one.
    """
    return parse_config(read_values(paths, overrides))


def read_values(
    paths: str | Path | Iterable[str | Path], overrides: str | Iterable[str]
) -> dict[str, Any]:
    """The values of files and overrides, merged as `load_config` does, and not validated yet."""
    merged: dict[str, Any] = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        merged = _merge(merged, paths_from(_read(path), path.parent))
    for override in [overrides] if isinstance(overrides, str) else overrides:
        merged = _merge(merged, _parse(override, where=f"--set '{override[:200]}'"))
    return merged


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate plain values, such as those of a resolved config. Raises ConfigError."""
    return validated(Config, values, known=names_by_section())


def validated(
    kind: type[SectionT], values: Mapping[str, Any], *, known: Mapping[str, Sequence[str]]
) -> SectionT:
    """The values as a whole configuration. `known` has the names in each section. Raises
    ConfigError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail, known) for detail in error.errors()]
        raise ConfigError(
            "the configuration is not usable:\n" + "\n".join(f"  - {line}" for line in lines)
        ) from None


def resolved_json(config: Config) -> str:
    """Every value, defaults included, as indented JSON that `parse_config` reads back."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not TOML: it is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        cure = (
            f"give a setting with --set '{path}'"
            if "=" in path.name
            else "give the path of a TOML file"
        )
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}; {cure}") from None
    return _parse(text, where=str(path))


def _parse(text: str, *, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        cure = suggestions.toml(text, str(error))
        if not cure and where.startswith("--set"):
            cure = "; quote text, as in 'student.dtype = \"float32\"'"
        raise ConfigError(f"{where} is not TOML: {error}{cure}") from None
    except RecursionError:
        raise ConfigError(
            f"{where} is nested too deeply: a setting is a table's key, as in 'student.seed = 1'"
        ) from None
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise ConfigError(f"{where} has a number that cannot be read: {error}") from None


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _explain(detail: Mapping[str, Any], known: Mapping[str, Sequence[str]]) -> str:
    """One mistake: the setting, what was found and what is wanted."""
    kind, found = detail["type"], detail["input"]
    place = [str(part) for part in detail["loc"] if part not in (WORD, TABLE)]
    if kind == "extra_forbidden":
        section = ".".join(part for part in place[:-1] if not part.isdigit())
        meant = suggestions.setting(place[-1], section=section, known=known)
        return f"{'.'.join(place)[:200]}: no such setting; {meant}"
    if kind == "missing":
        return f"{'.'.join(place)}: missing; it has no default"
    # a mistake between two sections names them itself, and has no place
    where = f"{'.'.join(place)}: " if place else ""
    message = str(detail["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}{message}"
    allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"]) if kind == "literal_error" else []
    meant = suggestions.value(found, allowed) if isinstance(found, str) else ""
    return f"{where}{message}; found {shown(found)}{meant}"
