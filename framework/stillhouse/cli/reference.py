"""docs/settings.md and docs/api.md, from the code that they describe.

`python -m stillhouse.cli.reference docs` writes both.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stillhouse
from stillhouse.config.sections import section_types
from stillhouse.config.settings import all_settings

_SETTINGS = """\
# Settings

A config is a TOML file with a table for each section below. Only `corpus.dataset`, `teacher.model`
and `student.model` have no default. `stillhouse init` writes a config to start from, and
`stillhouse check` says what it would do.

- **Several files** are merged left to right: `stillhouse run base.toml mine.toml`. The right one
  wins, setting by setting.
- **One setting** is changed on the command line, as a line of TOML:
  `stillhouse run base.toml --set 'student.learning_rate = 3e-5'`.
- **This table** in a terminal: `stillhouse settings`, `stillhouse settings student`,
  `stillhouse settings warm-up`.
- **In an editor**: `stillhouse init` writes `stillhouse.schema.json` beside the config, and at the
  config's top the line `#:schema ./stillhouse.schema.json`. Editors with Taplo (Even Better TOML
  for VS Code, and others) then complete and check settings, without a network. For another config,
  write the line and run `stillhouse schema > stillhouse.schema.json`.
- **Unknown names and values out of range** are refused, with the nearest right name.

## Relative paths

A relative path in a config file can be relative to that file, so that a run does not depend on the
directory in which the command is started:

| setting | value | is relative to |
| --- | --- | --- |
| inputs: `corpus.dataset`, `corpus.chat_template`, `teacher.model`, `student.model`, \
`student.tokenizer` | `./data` or `../data` | the directory of the config file |
| | `data`, where that exists beside the config file | the directory of the config file |
| | `data`, where it does not | the current directory, or it is a hub name |
| outputs: `store.url`, `student.checkpoint_url` | `./store` or `../store` | the directory of the \
config file |
| | `runs/store` | the current directory, as `--run-dir` is |

A path in `--set`, or in values given from Python, is relative to the current directory. Where a run
is resumed, two spellings of the same path are the same setting.
"""

_API = """\
# Python API

`import stillhouse` loads no heavy library; each of these names is imported when it is first used.
Everything else in the package may change without notice.

```python
import stillhouse

config = stillhouse.load_config("distil.toml")
plan = stillhouse.plan(config, run_dir="runs/mine")
scores = stillhouse.run(plan)
print(scores["student"].kl, scores["student"].agreement)
stillhouse.export(plan, "student")
```

Shapes in names: T tokens, H hidden, V vocabulary, K kept entries, N draws, B bytes of a record.
"""

_WIDTH = 80  # of a signature on one line
_GROUPS = {
    "A run": ("load_config", "plan", "run", "produce", "train", "evaluate", "export", "push"),
    "A target": (
        "TargetSpec",
        "Head",
        "CompressedLogits",
        "compress",
        "compress_hidden",
        "encode",
        "decode",
        "densify",
    ),
    "A loss": ("distillation_loss", "divergence_named", "Divergence"),
    "A store": ("ChunkStore", "Recipe", "list_recipes"),
    "Errors": ("StillhouseError", "UserError", "RunError"),
}


def settings_page() -> str:
    """docs/settings.md: every setting, a table for each section."""
    settings = all_settings()
    lines = [_SETTINGS]
    for name, kind in section_types().items():
        lines += [f"## [{name}]\n", f"{inspect.getdoc(kind)}\n"]
        lines += [
            "| setting | type and range | default | description |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| `{each.name}` | {each.kind} | `{each.default}` | {each.description} |"
            for each in settings
            if each.section == name
        ]
        lines.append("")
    return "\n".join(lines)


def api_page() -> str:
    """docs/api.md: the public names with their signatures and docstrings."""
    names = [name for group in _GROUPS.values() for name in group]
    assert sorted(names) == sorted(stillhouse.__all__), "a public name is in no group"
    lines = [_API]
    for title, group in _GROUPS.items():
        lines.append(f"## {title}\n")
        for name in group:
            lines += _entry(name, getattr(stillhouse, name))
    return "\n".join(lines)


def signature_of(value: Any) -> str:
    """The signature of a public function or class as its source writes it; '' for an error."""
    if isinstance(value, type) and issubclass(value, Exception):
        return ""
    signature = inspect.signature(value)
    parameters = [
        each.replace(annotation=_annotation(each.annotation), default=_default(each.default, value))
        for each in signature.parameters.values()
    ]
    is_class = isinstance(value, type)
    returned = signature.empty if is_class else _annotation(signature.return_annotation)
    plain = str(signature.replace(parameters=parameters, return_annotation=returned))
    if len(plain) <= _WIDTH:
        return plain

    # a long one: a line for each parameter
    lines = [str(each) for each in parameters]
    first_keyword = next(
        (at for at, each in enumerate(parameters) if each.kind is each.KEYWORD_ONLY), None
    )
    if first_keyword is not None:
        lines.insert(first_keyword, "*")
    inside = "".join(f"    {line},\n" for line in lines)
    return f"(\n{inside})" + ("" if returned is signature.empty else f" -> {returned}")


class _Words(str):
    """Text that a signature shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _annotation(annotation: Any) -> Any:
    """A type without the names of modules."""
    if annotation is inspect.Signature.empty:
        return annotation
    words = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    words = re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)|~(?=\w)", "", words)  # nor a type variable's mark
    # which numpy spells out, in each release its own way
    return _Words(re.sub(r"ndarray\[tuple\[[^\]]*\], dtype\[(\w+)\]\]", r"NDArray[\1]", words))


def _default(default: Any, owner: Any) -> Any:
    """A function or a tuple of the owner's module by its name there; another value as it is."""
    if not (inspect.isfunction(default) or (isinstance(default, tuple) and default)):
        return default
    names = vars(sys.modules[owner.__module__])
    return next((_Words(name) for name, value in names.items() if value is default), default)


def _entry(name: str, value: Any) -> Iterator[str]:
    kind = "class " if isinstance(value, type) else ""
    yield f"### {name}\n"
    yield f"```python\n{kind}{name}{signature_of(value)}\n```\n"
    yield f"{inspect.getdoc(value)}\n"
    for each, member in _methods(value):
        yield f"#### {name}.{each}\n"
        if not isinstance(member, property):
            yield f"```python\n{each}{signature_of(getattr(value, each))}\n```\n"
        yield f"{inspect.getdoc(member)}\n"


def _methods(value: Any) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class of ours that have a docstring; those that it
    inherits from another one of ours come first."""
    if not isinstance(value, type) or issubclass(value, Exception):
        return
    members: dict[str, Any] = {}
    for each in reversed(value.__mro__):
        if each.__module__.startswith("stillhouse."):
            members |= vars(each)
    for name, member in members.items():
        plain = getattr(member, "__func__", member)
        is_method = inspect.isfunction(plain) or isinstance(plain, property)
        if is_method and not name.startswith("_") and plain.__doc__:
            yield name, plain


def main() -> None:
    """Write both pages into the directory that is named."""
    folder = Path(sys.argv[1])
    (folder / "settings.md").write_text(settings_page(), encoding="utf-8")
    (folder / "api.md").write_text(api_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
