"""Relative paths in a config file: they are relative to that file.

- A path that begins with `./` or `../` is relative to the directory of its config file.
- Another relative path of an input (a data set, a model, a tokenizer, an interpreter) is looked for
  in that directory. Where it is not there, the value stays as it is: a hub name, or a path relative
  to the current directory.
- Another relative path of an output (`store.url`, `student.checkpoint_url`) is relative to the
  current directory, as --run-dir is.

Values of --set and of Python are relative to the current directory.
"""

import os
from collections.abc import Callable, Mapping
from glob import iglob
from pathlib import Path
from typing import Any

from stillhouse.config.sections import Config

_INPUTS = (
    ("corpus", "dataset"),
    ("corpus", "chat_template"),
    ("prompts", "dataset"),
    ("prompts", "chat_template"),
    ("teacher", "model"),
    ("teacher", "python"),
    ("writer", "model"),
    ("student", "model"),
    ("student", "tokenizer"),
)
_OUTPUTS = (("store", "url"), ("student", "checkpoint_url"))
_TABLES = "mixed_with"  # tables of corpus that have the same settings
_RULE, _TEST_SETS = "decontaminate", "test_sets"  # tables of one that name data sets
_STDLIB = "stdlib"  # a name of `corpus.dataset`, and no path


def paths_from(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a config file in `folder`, with paths relative to it made absolute. A value of
    a wrong type stays, for the validation to refuse."""
    placed = _changed(values, _INPUTS, lambda value: _input(value, folder))
    return _changed(placed, _OUTPUTS, lambda value: _explicit(value, folder) or value)


def with_absolute_inputs(config: Config) -> dict[str, Any]:
    """The JSON values of a config, with inputs in the current directory made absolute: two
    spellings of one path become equal."""
    return _changed(
        config.model_dump(mode="json"), _INPUTS, lambda value: _input(value, Path.cwd())
    )


def _changed(
    values: Mapping[str, Any],
    settings: tuple[tuple[str, str], ...],
    change: Callable[[str], str],
) -> dict[str, Any]:
    changed = dict(values)
    for section, name in settings:
        table = changed.get(section)
        if not isinstance(table, Mapping):
            continue
        changed[section] = _with_changed(table, name, change)
        more = table.get(_TABLES)
        if isinstance(more, list | tuple):
            changed[section][_TABLES] = [
                _with_changed(each, name, change) if isinstance(each, Mapping) else each
                for each in more
            ]
    return changed


def _with_changed(
    table: Mapping[str, Any], name: str, change: Callable[[str], str]
) -> dict[str, Any]:
    changed = dict(table)
    if isinstance(table.get(name), str):
        changed[name] = change(table[name])
    # a data set may be held against others
    rule = table.get(_RULE) if name == "dataset" else None
    test_sets = rule.get(_TEST_SETS) if isinstance(rule, Mapping) else None
    if isinstance(rule, Mapping) and isinstance(test_sets, Mapping):
        placed = {
            key: _with_changed(each, name, change) if isinstance(each, Mapping) else each
            for key, each in test_sets.items()
        }
        changed[_RULE] = {**rule, _TEST_SETS: placed}
    return changed


def is_template(value: str) -> bool:
    """Whether `corpus.chat_template` is a template, and no path."""
    return "{{" in value or "{%" in value


def _input(value: str, folder: Path) -> str:
    """An absolute path where the value names something in `folder`; else the value."""
    if is_template(value):
        return value
    explicit = _explicit(value, folder)
    if explicit is not None:
        return explicit
    if value == _STDLIB or value.startswith(("/", "~")) or not value.strip():
        return value
    is_there = next(iglob(value, root_dir=folder, recursive=True), None) is not None
    return _joined(value, folder) if is_there else value


def _explicit(value: str, folder: Path) -> str | None:
    """The absolute path of a value that begins with ./ or ../; None for any other."""
    return _joined(value, folder) if value.startswith(("./", "../")) else None


def _joined(value: str, folder: Path) -> str:
    # the parent of a linked directory is that of the directory itself
    base = os.path.realpath(folder) if value.startswith("../") else os.path.abspath(folder)
    return os.path.normpath(os.path.join(base, value))
