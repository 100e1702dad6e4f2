"""Whatever a line of the journal says, it is a row whose values have the types of its columns, or
it is refused with RunError.

It has its checksum, since the lines before it have theirs.
"""

import random
import re
import types
import zlib
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from helpers.bounded import bounded
from helpers.mutants import dumps, mutated_bytes, mutated_json
from stillhouse.errors import RunError
from stillhouse.tracking import Journal, NewerEvent, RunEvent, read_journal
from stillhouse.tracking.journal import scrubbed
from stillhouse.tracking.kinds import EVENT_TYPES

MUTANTS = 800
FEW_BYTES = 4096  # of all that is read


def example_of(kind: Any) -> Any:
    """A value of a column's type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return arguments[0]
    if origin in (Union, types.UnionType):
        return example_of(arguments[0])
    if origin is list:
        return [example_of(arguments[0])]
    if origin is dict:
        return {"a": example_of(arguments[1])}
    return {int: 3, float: 0.5, str: "words", bool: True}[kind]


def examples() -> Iterator[RunEvent]:
    """A row of each kind."""
    for row_type in EVENT_TYPES.values():
        yield row_type(**{column.name: example_of(column.type) for column in fields(row_type)})


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value may stand in a column of this type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return type(value) is str
    if origin in (Union, types.UnionType):
        return any(is_of(value, each) for each in arguments)
    if origin is list:
        return type(value) is list and all(is_of(each, arguments[0]) for each in value)
    if origin is dict:
        return type(value) is dict and all(
            is_of(key, arguments[0]) and is_of(each, arguments[1]) for key, each in value.items()
        )
    return type(value) in ((float, int) if kind is float else (kind,)) or (
        kind is types.NoneType and value is None
    )


def mutant(rng: random.Random, row: RunEvent, *, sealed: bool) -> bytes:
    values = mutated_json(rng, {"kind": row.kind, **asdict(row)})
    line = dumps(values)
    if sealed and line.endswith(b"}") and len(line) > 2:
        line = line[:-1] + b', "crc": "%08x"}' % zlib.crc32(line)
    return line if rng.random() < 0.85 else mutated_bytes(rng, line)


def is_sealed(line: bytes) -> bool:
    """Whether a checksum at its end is that of the rest."""
    seal = re.search(rb', "crc": "([0-9a-f]{8})"}$', line)
    return seal is not None and int(seal[1], 16) == zlib.crc32(line[: seal.start()] + b"}")


def test_a_line_is_a_row_of_its_types_or_is_refused_with_run_error(
    rng: random.Random, tmp_path: Path
) -> None:
    """It is the second of three lines; a row that was read is read back as it was, when it is
    recorded anew."""
    path, again, rows = tmp_path / "journal.jsonl", tmp_path / "again.jsonl", [*examples()]
    first, last = rows[0], rows[-1]
    Journal(path).record(first)
    before = path.read_bytes()
    path.unlink()
    Journal(path).record(last)
    after = path.read_bytes()
    num_read = 0
    for number in range(MUTANTS):
        line = (
            mutant(rng, rows[number % len(rows)], sealed=rng.random() < 0.8)
            .replace(b"\n", b" ")
            .replace(b"\r", b" ")
        )
        path.write_bytes(before + line + b"\n" + after)
        found = bounded(
            lambda: read_journal(path), num_bytes=len(line) + FEW_BYTES, refusal=RunError
        )
        if found is None:
            continue
        num_read += 1
        assert is_sealed(line), line
        assert [repr(found[0]), repr(found[-1])] == [repr(first), repr(last)]
        row = found[1]
        assert all(is_of(getattr(row, column.name), column.type) for column in fields(row)), line
        if isinstance(row, NewerEvent):
            assert row.name not in EVENT_TYPES, line
            continue
        again.unlink(missing_ok=True)
        Journal(again).record(row)
        (twice,) = read_journal(again)
        assert repr(replace(twice, time=0.0)) == repr(replace(scrubbed(row), time=0.0)), line
    assert num_read > MUTANTS // 20
