"""`journal.jsonl`, the append-only record of a run: each event is a row, a line of JSON.

Invariant: an event for which `Journal.record` has returned is on disk, whole, behind everything
that was there before. Several processes append to one journal. A row that a killed process left
half-written is never read, and the next process to append cuts it off. Each row ends with the
CRC-32 of the rest of it, so that a flipped bit is found.

Earlier versions wrote no checksums: a journal may begin with rows that have none. A later version
may write kinds of rows, and values in them, that this one does not know: they are left out, where
the checksum shows that the row is as it was written.
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
from stillhouse.tracking.events import NewerEvent, RunEvent
from stillhouse.tracking.kinds import EVENT_TYPES, is_of
from stillhouse.tracking.log import SCRUBBED

_log = logging.getLogger(__name__)

_FLOAT_TYPES = (float, float | None)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SEAL = re.compile(rb', "crc": "([0-9a-f]{8})"\}$')


@dataclass(frozen=True, slots=True)
class Journal:
    """Appends events to a file: a Tracker.

    The file is opened anew for each event, so a Journal can be pickled and sent to other processes.
    """

    path: Path
    clock: Callable[[], float] = time.time
    files: FileLayer = DISK

    def record(self, event: RunEvent) -> None:
        """Append one event, scrubbed of secrets, and return when it is on disk. One that `is_once`
        is left out where an equal one is there, of whatever time.

        Raises StoreUnavailable while the disk is full, and StoreError where the file cannot be
        written for another reason: then the journal is as before.
        """
        assert event.kind in EVENT_TYPES, f"{event} cannot be read back"
        stamped = scrubbed(event if event.time else replace(event, time=self.clock()))
        if event.is_once and stamped in (
            replace(each, time=stamped.time) for each in read_journal(self.path)
        ):
            return
        values = {"kind": event.kind, "time": stamped.time} | asdict(stamped)
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
        """Append a line under the file's lock, and sync it. At an OSError the file is as before."""
        descriptor = self.files.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_size == 0:
                # the file is new: its name may not be on disk yet
                self.files.sync_directory(self.path.parent)
            _cut_torn_line(descriptor, self.files)
            size = os.fstat(descriptor).st_size
            try:
                self.files.write(descriptor, line)
                self.files.sync(descriptor)
            except OSError:
                with suppress(OSError):
                    # the caller may record the event again: it would be there twice
                    self.files.truncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def scrubbed(event: RunEvent) -> RunEvent:
    """The event without secrets."""
    return replace(event, **scrub(asdict(event)))


def _sealed(line: bytes) -> bytes:
    """A row with its checksum as one more value."""
    return line[:-1] + b', "crc": "%08x"}' % zlib.crc32(line)


def _unsealed(line: bytes) -> tuple[bytes, bool]:
    """The row without its checksum, and whether it had one. Raises ValueError where the checksum
    differs."""
    seal = _SEAL.search(line)
    if seal is None:
        return line, False
    whole = line[: seal.start()] + b"}"
    if zlib.crc32(whole) != int(seal[1], 16):
        raise ValueError("its checksum differs, so it is damaged")
    return whole, True


def _cut_torn_line(descriptor: int, files: FileLayer) -> None:
    """Cut off a last line without a newline: its writer was killed."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        files.truncate(descriptor, os.pread(descriptor, size, 0).rfind(b"\n") + 1)


def _words(values: dict[str, Any]) -> str:
    """An event as a line of the log."""
    shown = {
        name: f"{value:.6g}" if isinstance(value, float) else repr(value)
        for name, value in values.items()
        if name not in ("kind", "time")
    }
    return " ".join([values["kind"], *(f"{name}={value}" for name, value in shown.items())])


def _finite_or_text(value: Any) -> Any:
    """JSON has no number that is not finite: those become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class JournalReader:
    """Reads a journal while other processes append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0  # read so far
        self.num_shortened = 0  # of these, rows whose values of a later version were left out
        self._offset = 0
        self._is_sealed = False  # whether a row had a checksum: all behind it must have one

    def new_events(self) -> list[RunEvent]:
        """The events whose rows were completed since the last call, in the order of the file.

        A NewerEvent stands for each of a kind that this version does not know. There are none while
        there is no file. Raises RunError at a line that is complete and is no row.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        events = [
            self._event(line, f"line {self.num_rows + i} of {self.path}")
            for i, line in enumerate(whole.splitlines(), 1)
        ]
        self._offset += len(whole)
        self.num_rows += len(events)
        return events

    def _event(self, line: bytes, where: str) -> RunEvent:
        """The event of a complete line. Raises RunError where it is none."""
        try:
            text, is_sealed = _unsealed(line)
            if self._is_sealed and not is_sealed:
                raise ValueError("it has no checksum, and lines before it have one")
            self._is_sealed = is_sealed
            event, is_whole = _parsed(json.loads(text), may_be_newer=is_sealed)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{where} is not a row of this version's journal ({type(error).__name__}: "
                f"{error}); restore the file, or take that line out, then go on"
            ) from error
        self.num_shortened += not is_whole
        return event


def read_journal(path: Path) -> list[RunEvent]:
    """Every event so far: none where there is no journal yet; a torn last line is left out.

    Raises RunError at a broken line.
    """
    return JournalReader(path).new_events()


def _parsed(values: dict[str, Any], *, may_be_newer: bool) -> tuple[RunEvent, bool]:
    """The event of a row, and whether it has all of the row's values.

    Raises ValueError, KeyError, TypeError or AttributeError where the values are no event.
    """
    kind = values.pop("kind")
    if may_be_newer and type(kind) is str and kind not in EVENT_TYPES:
        return _checked(NewerEvent(kind, time=values["time"])), True
    event_type = EVENT_TYPES[kind]
    known = {column.name: column.type for column in fields(event_type)}
    found = {name: value for name, value in values.items() if name in known or not may_be_newer}
    for name, value in found.items():
        if known.get(name) in _FLOAT_TYPES and isinstance(value, str):
            found[name] = float(value)
    return _checked(event_type(**found)), len(found) == len(values)


def _checked(event: RunEvent) -> RunEvent:
    """The event. Raises TypeError where a value is not of its field's type."""
    for column in fields(event):
        if not is_of(value := getattr(event, column.name), column.type):
            raise TypeError(f"{column.name} is {value!r:.100}")
    return event
