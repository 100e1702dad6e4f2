"""Logs: the form of a line, which events get one, and where warnings are shown."""

import logging
import os
import queue
import secrets
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import StringIO
from logging.handlers import QueueHandler
from pathlib import Path

import pytest
from rich.console import Console

from stillhouse.errors import RunError, StoreError
from stillhouse.redaction import know
from stillhouse.tracking import Journal, PoolEvent, ProgressView, RepairEvent
from stillhouse.tracking.log import (
    LogPlace,
    WarningReader,
    driver_log,
    failures_logged,
    handed_on,
    line_format,
    process_log,
    terminal_log,
)

log = logging.getLogger("stillhouse.store.tests")
ME = f"{socket.gethostname()}-{os.getpid()}"


def record(
    text: str, *arguments: object, level: int = logging.WARNING, created: float = 0.0
) -> logging.LogRecord:
    made = logging.LogRecord("stillhouse.store.tests", level, "tests.py", 1, text, arguments, None)
    made.created, made.msecs = created, created % 1 * 1000
    return made


def place_in(folder: Path) -> LogPlace:
    """A place with a driver's file."""
    (folder / "driver.log").touch()
    return LogPlace(folder, "driver.log", 1, logging.INFO)


def text_of(folder: Path, role: str) -> str:
    return (folder / f"{role}-{ME}.log").read_text(encoding="utf-8")


@contextmanager
def level_of(name: str, level: int, *, propagate: bool = True) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level, logger.propagate
    logger.setLevel(level)
    logger.propagate = propagate
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]


def state_of_logging() -> list[object]:
    loggers = [logging.getLogger(name) for name in ("", "stillhouse", "ray", "DeepSpeed")]
    return [
        threading.excepthook,
        warnings.showwarning,
        *((each.level, each.propagate, [*each.handlers]) for each in loggers),
    ]


def test_a_line_has_its_time_in_utc_its_level_its_process_and_its_module() -> None:
    line = line_format("teacher-3-host-712").format(record("chunk %d", 12, created=1_795_905_601.5))
    assert (
        line
        == "2026-11-28T22:40:01.500Z WARNING teacher-3-host-712 stillhouse.store.tests: chunk 12"
    )


def test_text_from_outside_shows_no_secret_steers_no_terminal_and_forges_no_line() -> None:
    secret = secrets.token_hex(16)
    know([secret])
    line = line_format("driver").format(
        record("%s", f"401 for {secret}\x1b[2J\n1970-01-01T00:00:00.000Z ERROR driver x: forged")
    )
    first, second = line.split("\n")
    assert first.endswith(": 401 for (redacted)\\x1b[2J")
    assert second == "    1970-01-01T00:00:00.000Z ERROR driver x: forged"


def test_the_driver_keeps_info_from_itself_and_warnings_of_libraries_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries whose loggers propagate, and others whose do not."""
    # a command in this process may have silenced it
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "filters", [])
    silent = (
        level_of("DeepSpeed", logging.INFO, propagate=False),
        level_of("torch.tests", logging.INFO, propagate=False),
    )
    with silent[0], silent[1], level_of("ray", logging.INFO), driver_log(tmp_path):
        for name in ("stillhouse.tests", "urllib3.tests", "ray", "DeepSpeed", "torch.tests"):
            for level in ("debug", "info", "warning"):
                getattr(logging.getLogger(name), level)("%s of %s", level, name)
    text = text_of(tmp_path / "logs", "driver")
    wanted = [
        "info of stillhouse.tests",
        *(
            f"warning of {name}"
            for name in ("stillhouse.tests", "urllib3.tests", "ray", "DeepSpeed", "torch.tests")
        ),
    ]
    assert [line.partition(": ")[2] for line in text.splitlines() if " of " in line] == wanted


def test_a_library_that_sets_level_and_format_of_its_handlers_has_its_warnings_scrubbed_still(
    tmp_path: Path,
) -> None:
    """As `ray.init` does."""
    secret, library = secrets.token_hex(16), logging.getLogger("ray")
    know([secret])
    others = [*library.handlers]
    with driver_log(tmp_path):
        for handler in set(library.handlers) - set(others):
            handler.setFormatter(logging.Formatter("%(message)s"))
        library.warning("401 for %s", secret)
    assert text_of(tmp_path / "logs", "driver").count("WARNING") == 1
    assert f" driver-{ME} ray: 401 for (redacted)\n" in text_of(tmp_path / "logs", "driver")


def test_the_level_of_our_logger_is_that_of_every_process(tmp_path: Path) -> None:
    with level_of("stillhouse", logging.DEBUG), driver_log(tmp_path, attempt=3):
        handed = handed_on()
        assert handed is not None
        log.debug("from the driver")
    assert (handed.directory, handed.attempt) == (tmp_path / "logs", 3)
    with process_log("teacher-0", handed):
        log.debug("from a teacher")
    assert "DEBUG" in text_of(tmp_path / "logs", "driver")
    assert "from a teacher" in text_of(tmp_path / "logs", "teacher-0")
    assert handed_on() is None


def test_what_a_process_logs_reaches_no_other_handler_and_afterwards_logging_is_as_it_was(
    tmp_path: Path,
) -> None:
    """Handlers of others do not scrub: Ray Train has one at the root of every rank."""
    heard = queue.SimpleQueue[logging.LogRecord]()
    other = QueueHandler(heard)
    logging.getLogger().addHandler(other)
    try:
        with level_of("stillhouse", logging.NOTSET):
            before = state_of_logging()
            with driver_log(tmp_path):
                log.warning("hot")
            assert state_of_logging() == before
    finally:
        logging.getLogger().removeHandler(other)
    assert heard.empty()


def test_journal_events_are_lines_of_the_log(tmp_path: Path) -> None:
    with driver_log(tmp_path):
        Journal(tmp_path / "journal.jsonl").record(RepairEvent(7))
    assert " INFO " in (
        line := next(
            line for line in text_of(tmp_path / "logs", "driver").splitlines() if "repair" in line
        )
    )
    assert line.endswith("stillhouse.tracking.journal: repair chunk=7")


def test_what_ends_a_thread_or_the_process_leaves_its_traceback_in_the_file_and_says_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in a thread")

    with suppress(IndexError), driver_log(tmp_path):
        thread = threading.Thread(target=fail, name="feeder")
        thread.start()
        thread.join()
        raise IndexError("in the driver")
    text, shown = text_of(tmp_path / "logs", "driver"), capsys.readouterr().err
    for words in (
        "thread feeder: ZeroDivisionError: in a thread",
        "in fail",
        "ended by: IndexError: in the driver",
        "Traceback",
    ):
        assert words in text
    assert [line.partition("log: ")[2] for line in shown.splitlines()] == [
        "thread feeder: ZeroDivisionError: in a thread"
    ]


def test_an_error_of_ours_is_no_warning_since_whoever_gets_it_tells_the_user(
    tmp_path: Path,
) -> None:
    with process_log("teacher-0", place_in(tmp_path)):
        for error in (RunError("expected"), IndexError("a bug")):
            with suppress(RunError, IndexError), failures_logged(log, "chunk 3"):
                raise error
    levels = [
        line.split()[1] for line in text_of(tmp_path, "teacher-0").splitlines() if "chunk 3" in line
    ]
    assert levels == ["INFO", "ERROR"]


def test_warnings_of_python_go_to_the_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with driver_log(tmp_path):
            warnings.warn("an old name", UserWarning, stacklevel=1)
    assert "UserWarning: an old name" in text_of(tmp_path / "logs", "driver")
    assert capsys.readouterr().err == ""


def test_a_warning_of_another_process_is_shown_by_the_driver_and_what_earlier_attempts_left_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn_as(role: str, text: str, place: LogPlace | None) -> None:
        with process_log(role, place):
            log.warning(text)
            log.info("no warning")

    logs = tmp_path / "logs"
    logs.mkdir()
    warn_as("teacher-0", "of yesterday", place_in(logs))
    with driver_log(tmp_path):
        handed = handed_on()
        logging.getLogger("stillhouse.tests").warning("of the driver")
    assert handed is not None
    with driver_log(tmp_path):
        warn_as("teacher-1", "of today\nand more of it", handed)
    shown = [line.partition("tests: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["of the driver", "of today"]


def test_a_warning_is_shown_by_the_console_that_draws_the_progress_bars(tmp_path: Path) -> None:
    screen = StringIO()
    with (
        driver_log(tmp_path),
        ProgressView(Console(file=screen, force_terminal=True, width=200)) as view,
    ):
        view.record(PoolEvent(1, 2, 1, 2, 10.0, 0.0, 0))
        log.warning("hot")
    assert "stillhouse.store.tests: hot\n" in screen.getvalue()


def test_of_many_warnings_at_once_ten_are_shown_and_the_others_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with driver_log(tmp_path):
        handed = handed_on()
        line = line_format("rank-0-host-1").format(record("hot"))
        (tmp_path / "logs" / "rank-0-host-1.log").write_text(f"{line}\n" * 25)
    assert handed is not None
    assert capsys.readouterr().err.splitlines() == [
        *[line] * 10,
        f"and 15 more warnings in {handed.directory}",
    ]


def test_a_reader_hands_out_whole_lines_of_our_warnings_once(tmp_path: Path) -> None:
    reader = WarningReader(tmp_path, but="driver.log")
    line = "1970-01-01T00:00:00.000Z WARNING rank-0-host-1 {}: text"
    file = tmp_path / "rank.log"
    torn = line.format("stillhouse.a")
    file.write_text(torn[:30])
    assert reader.new_lines() == []
    file.write_text(
        f"{torn}\n{line.format('torch')}\n    {torn}\n{torn.replace('WARNING', 'INFO')}\n"
    )
    (tmp_path / "driver.log").write_text(f"{torn}\n")
    assert reader.new_lines() == [torn]
    assert reader.new_lines() == []


def test_a_process_without_the_run_directory_writes_to_standard_error_and_sends_its_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[str] = []
    elsewhere = replace(
        place_in(tmp_path), driver="driver-of-another-machine.log", relay=sent.append
    )
    with process_log("teacher-3", elsewhere):
        log.info("begun")
        log.warning("hot")
    assert [path.name for path in tmp_path.iterdir()] == ["driver.log"]
    assert "tests: begun" in capsys.readouterr().err
    assert [line.partition("Z ")[2] for line in sent] == [
        f"WARNING teacher-3-{ME} stillhouse.store.tests: hot"
    ]


def test_a_driver_that_keeps_no_log_shows_its_own_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with terminal_log():
        log.warning("hot")
        log.info("begun")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("stillhouse.store.tests: hot")


def test_a_log_that_cannot_be_made_is_said_with_its_path_and_a_failing_one_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("no directory")
    with pytest.raises(StoreError, match=r"cannot write the log .*logs"), driver_log(tmp_path):
        pass
    full = place_in(tmp_path)
    (tmp_path / f"teacher-0-{ME}.log").symlink_to("/dev/full")
    with process_log("teacher-0", full):
        log.warning("lost")
    assert capsys.readouterr().err == ""
