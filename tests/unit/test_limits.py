"""Limits of size in the package: files, classes and functions that can be read in one go.

Lines are counted as they are, at the 100 columns that `make lint` allows. What is over a limit is
split, or named in EXCEPTIONS with the reason why it is one thing.
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "framework" / "stillhouse"

FILE = "lines of a file"
CLASS = "lines of a class"
ATTRIBUTES = "attributes that a class sets on self"
FUNCTION = "lines of a function"
PHASES = "code lines of a function without a comment on a line of its own"
LIMITS = {FILE: 400, CLASS: 250, ATTRIBUTES: 12, FUNCTION: 60, PHASES: 25}

MOST_EXCEPTIONS = 5  # a limit
EXCEPTIONS: dict[str, dict[str, str]] = {  # by limit: the name that the test prints, and the reason
    FILE: {},
    CLASS: {},
    ATTRIBUTES: {},
    FUNCTION: {},
    PHASES: {},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_is_over_a_limit_is_named_as_an_exception_and_nothing_else(limit: str) -> None:
    over = {name: size for name, size in sizes_in_package()[limit].items() if size > LIMITS[limit]}
    assert set(over) == set(EXCEPTIONS[limit]), (
        f"over {LIMITS[limit]} {limit}, or a stale exception: "
        f"{ {name: over.get(name) for name in set(over) ^ set(EXCEPTIONS[limit])} }"
    )


@pytest.mark.parametrize("limit", LIMITS)
def test_exceptions_of_a_limit_are_few_and_have_reasons(limit: str) -> None:
    assert len(EXCEPTIONS[limit]) <= MOST_EXCEPTIONS
    assert all(reason for reason in EXCEPTIONS[limit].values())


def test_sizes_are_counted_as_the_limits_say() -> None:
    source = '''class Reader:
    def __init__(self) -> None:
        """One line.

        # not a comment
        """
        self.step, self._open = 0, 1  # not on a line of its own

        self.step += 1

    def explained(self) -> None:
        # the only phase
        self.step = self.later = 2
'''
    assert sizes("a.py", source) == {
        FILE: {"a.py": 13},
        CLASS: {"a.py:Reader": 13},
        ATTRIBUTES: {"a.py:Reader": 3},
        FUNCTION: {"a.py:Reader.__init__": 8, "a.py:Reader.explained": 3},
        PHASES: {"a.py:Reader.__init__": 3},
    }


@cache
def sizes_in_package() -> dict[str, dict[str, int]]:
    """For each limit: the size of what it counts, by name."""
    found: dict[str, dict[str, int]] = {limit: {} for limit in LIMITS}
    for path in sorted(PACKAGE.rglob("*.py")):
        of_file = sizes(path.relative_to(PACKAGE).as_posix(), path.read_text())
        for limit in LIMITS:
            found[limit] |= of_file[limit]
    return found


def sizes(file: str, source: str) -> dict[str, dict[str, int]]:
    """The same of one file's source."""
    found: dict[str, dict[str, int]] = {limit: {} for limit in LIMITS}
    found[FILE][file] = len(source.splitlines())
    comments = own_line_comments(source)
    blanks = {n for n, line in enumerate(source.splitlines(), 1) if not line.strip()}
    for name, node in definitions(ast.parse(source), ""):
        lines = lines_of(node)
        if isinstance(node, ast.ClassDef):
            found[CLASS][f"{file}:{name}"] = len(lines)
            found[ATTRIBUTES][f"{file}:{name}"] = len(attributes_set_on_self(node))
            continue
        found[FUNCTION][f"{file}:{name}"] = len(lines)
        if not comments.intersection(lines):
            without = blanks.union(lines_of(node.body[0]) if ast.get_docstring(node) else ())
            found[PHASES][f"{file}:{name}"] = len(set(lines) - without)
    return found


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Every class and function under a node, by qualified name."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            yield f"{prefix}{node.name}", node
            yield from definitions(node, f"{prefix}{node.name}.")
        else:
            yield from definitions(node, prefix)


def lines_of(node: ast.stmt) -> range:
    assert node.end_lineno is not None
    return range(node.lineno, node.end_lineno + 1)


def attributes_set_on_self(node: ast.ClassDef) -> set[str]:
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }


def own_line_comments(source: str) -> set[int]:
    """The numbers of the lines that hold a comment and nothing else."""
    return {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#")
    }
