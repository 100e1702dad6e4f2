"""`journal.jsonl`, the record of a run.

Invariant: a row for which `Journal.record` has returned is on disk, whole, behind everything that
was there before. Several processes append to one journal; what a killed one left half-written is
cut off by whoever appends next, and never read. Each line ends with the CRC-32 of the rest of it,
so that a flipped bit is found and not believed.

Earlier versions wrote no checksums: a journal may begin with lines that have none. A later version
may write kinds of rows, and values in them, that this one does not know: those are left out, where
the line's checksum shows that it is as it was written.
"""

import errno
import fcntl
import json
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from stillhouse.atomic import DISK, FileLayer
from stillhouse.errors import RunError, StoreError, StoreUnavailable
from stillhouse.redaction import scrub
from stillhouse.tracking.events import ROW_TYPES, NewerRow, Row, is_of
from stillhouse.tracking.log import SCRUBBED

_log = logging.getLogger(__name__)

_FLOAT_TYPES = (float, float | None)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SEAL = re.compile(rb', "crc": "([0-9a-f]{8})"\}$')


@dataclass(frozen=True, slots=True)
class Journal:
    """The record of a run: a Tracker. It opens its file anew for each row, so it can be pickled and
    sent to another process."""

    path: Path
    clock: Callable[[], float] = time.time
    files: FileLayer = DISK

    def record(self, row: Row) -> None:
        """Append one row and return when it is on disk, scrubbed of secrets.

        Raises StoreUnavailable while the disk is full, StoreError where it cannot be written for
        another reason: the journal is as before.
        """
        assert row.kind in ROW_TYPES, f"{row} cannot be read back"
        stamped = scrubbed(row if row.time else replace(row, time=self.clock()))
        values = {"kind": row.kind, "time": stamped.time} | asdict(stamped)
        line = json.dumps(
            {name: _finite_or_text(value) for name, value in values.items()}, allow_nan=False
        ).encode()
        try:
            self._append(_sealed(line) + b"\n")
        except OSError as error:
            if error.errno in _FULL:
                raise StoreUnavailable(
                    f"cannot append to {self.path}: {error.strerror}; make room on that disk"
                ) from error
            raise StoreError(
                f"cannot append to {self.path}: {error.strerror}; give write access, then resume"
            ) from error
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s", _words(values), extra={SCRUBBED: True})

    def _append(self, line: bytes) -> None:
        descriptor = self.files.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_size == 0:
                # a file that is new, and whose name may not be on disk
                self.files.sync_directory(self.path.parent)
            _cut_torn_line(descriptor, self.files)
            size = os.fstat(descriptor).st_size
            try:
                self.files.write(descriptor, line)
                self.files.sync(descriptor)
            except OSError:
                with suppress(OSError):
                    # or a row that is recorded again would be there twice
                    self.files.truncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def scrubbed(row: Row) -> Row:
    """The row without secrets."""
    return replace(row, **scrub(asdict(row)))


def _sealed(line: bytes) -> bytes:
    """A line of JSON with its checksum as one more value."""
    return line[:-1] + b', "crc": "%08x"}' % zlib.crc32(line)


def _unsealed(line: bytes) -> tuple[bytes, bool]:
    """The line without its checksum, and whether it had one. Raises ValueError where that is not
    the line's."""
    seal = _SEAL.search(line)
    if seal is None:
        return line, False
    whole = line[: seal.start()] + b"}"
    if zlib.crc32(whole) != int(seal[1], 16):
        raise ValueError("its checksum differs, so it is damaged")
    return whole, True


def _cut_torn_line(descriptor: int, files: FileLayer) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        files.truncate(descriptor, os.pread(descriptor, size, 0).rfind(b"\n") + 1)


def _words(values: dict[str, Any]) -> str:
    """A row as a line of the log."""
    shown = {
        name: f"{value:.6g}" if isinstance(value, float) else repr(value)
        for name, value in values.items()
        if name not in ("kind", "time")
    }
    return " ".join([values["kind"], *(f"{name}={value}" for name, value in shown.items())])


def _finite_or_text(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class JournalReader:
    """Reads a journal while others write it: each call hands out the rows that have become whole
    since the last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0  # handed out so far
        self.num_shortened = (
            0  # of these, how many have values of a later version, which were left out
        )
        self._offset = 0
        self._is_sealed = (
            False  # whether a line with a checksum was read: then those behind it have one, too
        )

    def new_rows(self) -> list[Row]:
        """Rows in the order of the file, a NewerRow for each of a kind that this version does not
        know; none while there is no file.

        Raises RunError at a line that is whole but is no row.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        rows = [
            self._row(line, f"line {self.num_rows + i} of {self.path}")
            for i, line in enumerate(whole.splitlines(), 1)
        ]
        self._offset += len(whole)
        self.num_rows += len(rows)
        return rows

    def _row(self, line: bytes, where: str) -> Row:
        try:
            text, is_sealed = _unsealed(line)
            if self._is_sealed and not is_sealed:
                raise ValueError("it has no checksum, and lines before it have one")
            self._is_sealed = is_sealed
            row, is_whole = _parsed(json.loads(text), may_be_newer=is_sealed)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{where} is not a row of this version's journal ({type(error).__name__}: "
                f"{error}); "
                "restore the file, or take that line out, then go on"
            ) from error
        self.num_shortened += not is_whole
        return row


def read_journal(path: Path) -> list[Row]:
    """Every whole row so far: none where there is no journal yet; a torn last line is left out.
    Raises RunError at a broken line."""
    return JournalReader(path).new_rows()


def _parsed(values: dict[str, Any], *, may_be_newer: bool) -> tuple[Row, bool]:
    """The row of a line, and whether it has all of the line's values. Raises as Python does where
    it is none."""
    kind = values.pop("kind")
    if may_be_newer and type(kind) is str and kind not in ROW_TYPES:
        return _checked(NewerRow(kind, time=values["time"])), True
    row_type = ROW_TYPES[kind]
    known = {column.name: column.type for column in fields(row_type)}
    found = {name: value for name, value in values.items() if name in known or not may_be_newer}
    for name, value in found.items():
        if known.get(name) in _FLOAT_TYPES and isinstance(value, str):
            found[name] = float(value)
    return _checked(row_type(**found)), len(found) == len(values)


def _checked(row: Row) -> Row:
    """The row. Raises TypeError where a value is not of its column's type."""
    for column in fields(row):
        if not is_of(getattr(row, column.name), column.type):
            raise TypeError(f"{column.name} is {getattr(row, column.name)!r:.100}")
    return row
