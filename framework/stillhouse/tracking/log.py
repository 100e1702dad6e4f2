"""Logs: a file for each process in the run directory, and all their warnings at the driver.

    <run directory>/logs/<role>-<host>-<pid>.log
    2026-11-28T22:40:01.123Z ERROR teacher-3-host-712 stillhouse.teacher.actor: chunk 12: IndexError

The driver reads the other processes' files, which outlive them, and shows their warnings on its
standard error. A process that does not share the run directory writes to its own standard error,
which Ray keeps on that machine, and sends its warnings to the coordinator, whose file has them.

Every line is scrubbed of secrets and of control sequences. All lines of a text but its first are
indented, so that no text from outside can pass for a line of the log.
"""

import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from stillhouse.errors import StillhouseError, StoreError
from stillhouse.redaction import scrub
from stillhouse.terminal import printable, say
from stillhouse.tracking.follow import followed

_log = logging.getLogger(__name__)
_ours = logging.getLogger("stillhouse")

SCRUBBED = "stillhouse_scrubbed"  # an attribute of log records that need not be scrubbed again
# Their loggers do not propagate, or will not once they are imported.
_LIBRARIES = ("DeepSpeed", "datasets", "ray", "ray.train", "torch", "transformers")
_VERSIONED = ("stillhouse", "torch", "deepspeed", "ray", "transformers")
_WARNING = re.compile(r"\S+Z (?:WARNING|ERROR|CRITICAL) \S+ stillhouse[.:]")
_LOOK_EVERY_S = 1.0
_MOST_AT_ONCE = 10  # lines: one cause may make all processes of a cluster warn


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Where the processes of an attempt keep their logs; the driver hands it to each of them."""

    directory: Path
    driver: str  # the name of the driver's file: a process that finds it shares the directory
    attempt: int  # 0: of no attempt
    level: int  # of Stillhouse's own lines; of libraries, warnings are kept
    relay: Callable[[str], None] | None = None  # sends a line to the coordinator


_handed_on: LogPlace | None = None


def handed_on() -> LogPlace | None:
    """The LogPlace for the processes that this driver starts; None where it keeps no log."""
    return _handed_on


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        clean = text if getattr(record, SCRUBBED, False) else scrub(text)
        return printable(clean).replace("\n", "\n    ")


def line_format(process: str) -> logging.Formatter:
    """The format of a process's lines: time, level, process, module and text."""
    text = f"%(asctime)s.%(msecs)03dZ %(levelname)s {process} %(name)s: %(message)s"
    formatter = _Formatter(text, "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    return formatter


@contextmanager
def driver_log(run_dir: Path, *, attempt: int = 0) -> Iterator[None]:
    """Keep the driver's log while the block lasts, and show the warnings of all processes.

    The level is that of the logger `stillhouse`, INFO where it has none. Raises StoreError where no
    file can be made.
    """
    # The driver's own file.
    global _handed_on
    directory, process = run_dir / "logs", _process("driver")
    path, level = directory / f"{process}.log", _ours.level or logging.INFO
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise StoreError(
            f"cannot write the log {path}: {error.strerror}; make room or give write access, then "
            "resume"
        ) from error

    # Its lines, and the warnings of the processes that it starts.
    _handed_on = LogPlace(directory, path.name, attempt, level)
    try:
        with (
            _kept(process, level, file),
            terminal_log(),
            _shown(WarningReader(directory, but=path.name)),
        ):
            yield
    finally:
        _handed_on = None


@contextmanager
def process_log(role: str, place: LogPlace | None) -> Iterator[None]:
    """Keep the log of a process that the driver started, while the block lasts."""
    process, level, relay = _process(role), logging.INFO, None
    handler: logging.Handler = logging.StreamHandler()
    if place is not None:
        level, path = place.level, place.directory / f"{process}.log"
        try:
            (place.directory / place.driver).stat()
            handler = _LogFile(path, encoding="utf-8")
        except OSError:  # the directory is not shared with this machine, or cannot be written
            relay = place.relay
    relaying = nullcontext() if relay is None else _warnings_sent(process, to=relay)
    with _kept(process, level, handler), relaying:
        yield


def terminal_log() -> AbstractContextManager[None]:
    """Show this driver's own warnings on standard error while the block lasts."""
    return _warnings_sent(_process("driver"), to=partial(say, error=True))


@contextmanager
def failures_logged(logger: logging.Logger, doing: str) -> Iterator[None]:
    """Log the exception that ends the block, with its traceback.

    A StillhouseError is logged as INFO: its message reaches the user another way.
    """
    try:
        yield
    except GeneratorExit:  # the actor is being stopped
        raise
    except BaseException as error:
        is_bug = isinstance(error, Exception) and not isinstance(error, StillhouseError)
        level = logging.ERROR if is_bug else logging.INFO
        logger.log(level, "%s: %s: %s", doing, type(error).__name__, error, exc_info=True)
        raise


class WarningReader:
    """Reads Stillhouse's warnings in a directory's logs while processes write them.

    Lines that are there at first are of earlier attempts, and left out, as is the file named `but`.
    """

    def __init__(self, directory: Path, *, but: str) -> None:
        self.directory, self._but = directory, but
        self._offsets: dict[str, int] = {}
        self.new_lines()

    def new_lines(self) -> list[str]:
        """The first line of each warning since the last call, file by file."""
        return [
            line for path in sorted(self.directory.glob("*.log")) for line in self._new_in(path)
        ]

    def _new_in(self, path: Path) -> list[str]:
        """The warnings in what was appended to a file since the last call."""
        offset = self._offsets.get(path.name, 0)
        if path.name == self._but or path.stat().st_size <= offset:
            return []
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offsets[path.name] = offset + len(whole)
        return [line for line in whole.decode(errors="replace").split("\n") if _WARNING.match(line)]


@contextmanager
def _shown(reader: WarningReader) -> Iterator[None]:
    """Show other processes' warnings, from a thread; by `say`, which tears no progress bar."""

    def look() -> None:
        try:
            lines = reader.new_lines()
        except OSError:  # a file was removed, or its file system does not answer: look again
            return
        for line in lines[:_MOST_AT_ONCE]:
            say(line, error=True)
        if len(lines) > _MOST_AT_ONCE:
            num_more = len(lines) - _MOST_AT_ONCE
            say(f"and {num_more} more warnings in {reader.directory}", error=True)

    with followed(look, every_s=_LOOK_EVERY_S, name="warnings"):
        yield


@contextmanager
def _kept(process: str, level: int, handler: logging.Handler) -> Iterator[None]:
    """Send Stillhouse's lines from `level` on to the handler, with the warnings of libraries and of
    Python, and the exceptions that end a thread or the block."""
    # Change the process's logging.
    handler.setFormatter(line_format(process))
    handler.addFilter(_is_worth_a_line)
    level_before, propagate_before, hook_before = _ours.level, _ours.propagate, threading.excepthook
    _ours.setLevel(level)
    _ours.propagate = False  # to handlers of the root, which do not scrub
    threading.excepthook = _log_thread
    logging.captureWarnings(True)

    # Log the block, then change everything back.
    try:
        with _added(handler, "", _ours.name), _added(_Carrier(handler), *_not_propagating()):
            versions = ", ".join(f"{name} {version(name)}" for name in _VERSIONED)
            _log.info("begins: %s, Python %s", versions, sys.version.partition(" ")[0])
            try:
                with failures_logged(_log, "ended by"):
                    yield
            finally:
                _log.info("ends")
    finally:
        logging.captureWarnings(False)
        _ours.setLevel(level_before)
        _ours.propagate, threading.excepthook = propagate_before, hook_before
        with suppress(OSError):  # the disk is full
            handler.close()


@contextmanager
def _added(handler: logging.Handler, *names: str) -> Iterator[None]:
    """Add a handler to these loggers while the block lasts."""
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@contextmanager
def _warnings_sent(process: str, *, to: Callable[[str], None]) -> Iterator[None]:
    """Pass the first line of each of this process's warnings to a function."""
    handler = _FirstLines(to)
    handler.setFormatter(line_format(process))
    handler.setLevel(logging.WARNING)
    with _added(handler, _ours.name):
        yield


class _FirstLines(logging.Handler):
    """Passes on the first line of each text: the traceback behind it is in the file."""

    def __init__(self, send: Callable[[str], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(self.format(record).partition("\n")[0])
        except Exception:
            self.handleError(record)


class _Carrier(logging.Handler):
    """Passes records on to another handler, whose level and format libraries then cannot change."""

    def __init__(self, to: logging.Handler) -> None:
        super().__init__()
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        self._to.handle(record)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Do nothing: a full disk must not end a run; the journal records it."""


def _not_propagating() -> set[str]:
    """Loggers of libraries whose records do not reach the root, or will not once they are imported.

    Torch's traces, whose names have a `.__`, are left out: they cost time once they have a handler.
    """
    loggers = [*logging.root.manager.loggerDict.items()]
    found = {
        name
        for name, logger in loggers
        if isinstance(logger, logging.Logger) and not logger.propagate and ".__" not in name
    }
    return found.union(_LIBRARIES) - {_ours.name}


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether a record is one of ours or a warning, and new: it comes from its own logger and from
    each logger above."""
    is_new = not hasattr(record, "stillhouse_kept")
    record.stillhouse_kept = True
    return is_new and (
        record.levelno >= logging.WARNING or record.name.partition(".")[0] == _ours.name
    )


def _log_thread(ended: threading.ExceptHookArgs) -> None:
    """Log the exception that ended a thread."""
    if ended.exc_type is not SystemExit and ended.exc_value is not None:
        name = "a thread" if ended.thread is None else f"thread {ended.thread.name}"
        found = (ended.exc_type, ended.exc_value, ended.exc_traceback)
        _log.error("%s: %s: %s", name, ended.exc_type.__name__, ended.exc_value, exc_info=found)


def _process(role: str) -> str:
    return f"{role}-{socket.gethostname()}-{os.getpid()}"
