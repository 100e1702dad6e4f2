"""Promises of the journal and its views."""

import errno
import io
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from wandb.proto import wandb_internal_pb2

from helpers.journals import START as RUN_START
from helpers.sealing import sealed_line
from stillhouse.atomic import Buffer, SystemFiles
from stillhouse.config import TrackingSection
from stillhouse.errors import RunError, StoreError, StoreUnavailable
from stillhouse.tracking import (
    CheckpointEvent,
    ChunkEvent,
    DamagedEvent,
    DelayEvent,
    EarlyStopEvent,
    EndEvent,
    EvalEvent,
    HeldoutEvent,
    Journal,
    JournalReader,
    NewerEvent,
    NoticeEvent,
    OutageEvent,
    PatientTracker,
    PhaseEvent,
    PoolEvent,
    ProgressView,
    RecoveryEvent,
    RepairEvent,
    Role,
    RunEvent,
    SetAsideEvent,
    StallEvent,
    TeacherEvent,
    TrainEvent,
    WaitEvent,
    WandbView,
    latest_train_events,
    read_journal,
)

START = replace(
    RUN_START,
    versions={"torch": "2.13.0"},
    teacher="acme/teacher",
    student="acme/student",
    num_teachers=2,
)
TRAIN = TrainEvent("student", 1, 2.5, 2.0, None, 0.7, 1e-4, 500, 2.0, 0.5, 250.0, time=1010.0)
POOL = PoolEvent(
    published=2,
    needed=8,
    in_flight=3,
    window_chunks=4,
    tokens_per_s=1234.5,
    window_wait_s=0.5,
    failures=0,
    time=1011.0,
)
HELDOUT = HeldoutEvent("student", 4, 512, 4.25, 0.875, 0.5, 0.04, 0.625, 1.5, time=1015.0)
ROWS = [
    START,
    TeacherEvent(0, 12.5, "cuda:0", "triton: its kernels passed", time=1001.0),
    ChunkEvent(3, 250, 44_000, 1.5, 0, 0.97, 3e-6, 4e-4, False, time=1002.0),
    POOL,
    TRAIN,
    replace(
        TRAIN,
        role="control",
        loss=float("nan"),
        divergence=None,
        cross_entropy=3.5,
        grad_norm=float("inf"),
    ),
    CheckpointEvent("student", 5, 0.8, 123_456, 0.1, time=1020.0),
    DelayEvent("student", 5, 1, "the store is too busy", time=1020.2),
    OutageEvent("student, rank 1", 61.0, "the store is too busy", time=1020.3),
    DamagedEvent("student", "step-00000005.json: its checksum differs", time=1020.5),
    RecoveryEvent("student", "notice", "aws: terminate", 6.5, 1, 5, 0, time=1021.0),
    NoticeEvent("aws", "f00", 110.0, "terminate", time=1021.5),
    WaitEvent("GPU: 8 needed (8 teachers), 0 in the cluster", time=1000.5),
    PhaseEvent("run", "starting Ray", time=1000.6),
    StallEvent("student", 1, 6, "reading", 61.0, "File train.py, line 1", 12, time=1022.0),
    StallEvent("teacher", 1, 0, "work", 301.0, "", time=1022.5),
    SetAsideEvent(4, [33], "IndexError: index out of range", time=1023.0),
    RepairEvent(3, time=1024.0),
    HELDOUT,
    EarlyStopEvent("student", 8, 4, 0.875, time=1016.0),
    EvalEvent("teacher", 0, 4096, 3.05, None, 1.0, 0.02, 1.0, time=1030.0),
    EvalEvent("student", 10, 4096, 3.41, 0.31, 0.71, 0.03, 0.78, time=1031.0),
    EndEvent("done", 31.0, "", {"student": 6}, {"student": 10}, time=1032.0),
]
SECRET = "s3cr3t-do-not-print-this-0123456789"


def test_an_early_stop_that_is_found_again_by_a_resumed_training_is_journalled_once(
    tmp_path: Path,
) -> None:
    stop, path = EarlyStopEvent("student", 8, 4, 0.875), tmp_path / "journal.jsonl"
    later, other = replace(stop, step=12), replace(stop, role="control")
    for event in (stop, TRAIN, stop, later, other, later, stop, TRAIN):
        Journal(path).record(event)
    found = [replace(event, time=0.0) for event in read_journal(path)]
    assert found == [replace(event, time=0.0) for event in (stop, TRAIN, later, other, TRAIN)]


def test_every_row_comes_back_as_it_went_in_non_finite_numbers_included(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for row in ROWS:
        journal.record(row)
    # repr: nan is not equal to itself
    assert [repr(row) for row in read_journal(journal.path)] == [repr(row) for row in ROWS]


def test_a_journal_of_a_version_that_knew_fewer_values_is_read(tmp_path: Path) -> None:
    """Starts without a schedule, ends without numbers of steps."""
    whole = {"kind": "start", **asdict(START)}
    for name in (
        "learning_rate",
        "min_learning_rate",
        "warmup_steps",
        "epochs",
        "max_steps",
        "committed_steps",
    ):
        del whole[name]
    end = {"kind": "end", "time": 1032.0, "outcome": "done", "seconds": 31.0, "message": ""}
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in (whole, end)))
    assert read_journal(path) == [START, EndEvent("done", 31.0, "", time=1032.0)]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"kind": "repair", "time": 1.0, "chunk": "3"}',
        '{"kind": "repair", "time": 1.0, "chunk": true}',
        '{"kind": "repair", "time": 1.0, "chunk": 3.0}',
        '{"kind": "repair", "time": [1.0], "chunk": 3}',
        '{"kind": "repair", "time": 1%s, "chunk": 3}' % ("0" * 400),
        '{"kind": "set_aside", "time": 1.0, "chunk": 3, "sequences": [3, "4"], "reason": ""}',
        '{"kind": "end", "time": 1.0, "outcome": 1, "seconds": 1.0, "message": ""}',
        '{"kind": "end", "time": 1.0, "outcome": "done", "seconds": 1.0, "message": "", '
        '"steps_done": {"student": null}}',
    ],
    ids=range(9),
)
def test_a_line_whose_values_are_not_of_its_columns_types_is_refused_with_its_place(
    tmp_path: Path, line: Any
) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RunError, match=r"^line 1 of .*journal\.jsonl is not a row"):
        read_journal(path)


def test_a_number_without_a_fraction_may_stand_for_one_with(tmp_path: Path) -> None:
    """As other languages write 1.0."""
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind": "repair", "time": 1, "chunk": 3}\n')
    assert read_journal(path) == [RepairEvent(3, time=1.0)]


def test_each_line_is_strict_json_with_its_kind_and_time_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", clock=lambda: 77.0)
    for row in [*ROWS, replace(TRAIN, time=0.0)]:
        journal.record(row)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [
        json.loads(line, parse_constant=refuse) for line in journal.path.read_text().splitlines()
    ]
    assert all(list(line)[:2] == ["kind", "time"] for line in lines)
    assert lines[-1]["time"] == 77.0


def test_a_kill_without_notice_loses_no_row_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    program = (
        "import dataclasses, pathlib, sys\n"
        "from stillhouse.tracking import Journal, PoolEvent\n"
        "journal, n = Journal(pathlib.Path(sys.argv[1])), 0\n"
        "while True:\n"
        "    journal.record(PoolEvent(n, 8, 3, 4, 1.0, 0.0, 0)); n += 1\n"
        "    print(n, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 50:
            pass
        writer.send_signal(signal.SIGKILL)
        told = [int(line) for line in writer.stdout.read().splitlines() if line.strip()]
    acknowledged = max([50, *told])
    rows = read_journal(path)
    assert [row.published for row in rows if isinstance(row, PoolEvent)] == list(range(len(rows)))
    assert len(rows) in (acknowledged, acknowledged + 1)


@pytest.mark.parametrize("torn", [b"{", b'{"kind": "pool", "time": 1011.0, "publi', b"\x00" * 40])
def test_a_torn_last_line_is_not_read_and_the_next_row_takes_its_place(
    tmp_path: Path, torn: bytes
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record(START)
    with journal.path.open("ab") as file:
        file.write(torn)
    assert read_journal(journal.path) == [START]
    journal.record(TRAIN)
    assert read_journal(journal.path) == [START, TRAIN]


def test_a_figure_that_a_row_may_lack_may_be_missing_from_a_line_without_a_checksum(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).record(replace(TRAIN, z_loss=7.0))
    assert read_journal(path) == [replace(TRAIN, z_loss=7.0)]
    values = json.loads(path.read_text())
    del values["z_loss"], values["crc"]
    path.write_text(json.dumps(values) + "\n")
    assert read_journal(path) == [TRAIN]


NEWER = {"kind": "weather", "time": 1012.0, "mood": {"of": ["the", 7, None]}}


def test_rows_and_values_of_a_later_version_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).record(START)
    with path.open("ab") as file:
        file.write(
            sealed_line(**NEWER) + sealed_line(kind="pool", temperature=41.5, **asdict(POOL))
        )
    Journal(path).record(TRAIN)
    reader = JournalReader(path)
    assert reader.new_events() == [START, NewerEvent("weather", time=1012.0), POOL, TRAIN]
    assert reader.num_shortened == 1


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(NEWER).encode() + b"\n",  # nothing shows that it is as it was written
        sealed_line(**NEWER).replace(b"weather", b"wether!"),
        sealed_line(kind="weather"),  # when?
        sealed_line(kind="pool", published=3),  # every version writes the others, too
        sealed_line(kind="repair", time=1.0, chunk="3"),
    ],
    ids=["no checksum", "damaged", "no time", "too few values", "another type"],
)
def test_a_line_is_not_taken_for_one_of_a_later_version_where_it_is_damaged(
    tmp_path: Path, line: Any
) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).record(START)
    with path.open("ab") as file:
        file.write(line)
    with pytest.raises(RunError, match="line 2 of "):
        read_journal(path)


def test_a_line_without_a_checksum_is_refused_behind_one_that_has_one(tmp_path: Path) -> None:
    """Whoever follows the journal knows it, too."""
    path = tmp_path / "journal.jsonl"
    bare = [json.dumps({"kind": row.kind, **asdict(row)}) + "\n" for row in (START, POOL)]
    path.write_text(bare[0])
    reader = JournalReader(path)
    Journal(path).record(TRAIN)
    assert reader.new_events() == [START, TRAIN]  # an earlier version began this journal
    with path.open("a") as file:
        file.write(bare[1])
    for look in (reader.new_events, lambda: read_journal(path)):
        with pytest.raises(
            RunError, match=r"line 3 of .*it has no checksum, and lines before it have one"
        ):
            look()


def test_a_bit_flipped_in_a_line_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).record(START)
    Journal(path).record(TRAIN)
    whole = path.read_bytes()
    for place in range(
        len(whole) - 1
    ):  # without the last line's end: that line would be one that was never finished
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        with pytest.raises(
            RunError, match=f"line {1 if place <= whole.index(10) else 2} of .*journal"
        ):
            read_journal(path)


@pytest.mark.parametrize(
    "broken", ["{", "[]", "7", '{"kind": "song"}', '{"kind": "pool", "published": 3}', "\x00\x00"]
)
def test_a_broken_line_elsewhere_is_refused_with_its_number(tmp_path: Path, broken: str) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record(START)
    with journal.path.open("a") as file:
        file.write(broken + "\n")
    journal.record(TRAIN)
    with pytest.raises(RunError, match="line 2 of "):
        read_journal(journal.path)


def test_a_reader_that_follows_names_the_line_of_the_whole_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    reader = JournalReader(journal.path)
    for row in ROWS:
        journal.record(row)
    reader.new_events()
    with journal.path.open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(RunError, match=f"line {len(ROWS) + 1} of "):
        reader.new_events()


def test_a_reader_hands_out_each_row_once_as_soon_as_it_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    reader = JournalReader(journal.path)
    assert reader.new_events() == []
    journal.record(START)
    assert reader.new_events() == [START]
    line = sealed_line(kind="pool", **asdict(POOL)).decode()
    with journal.path.open("a") as file:
        file.write(line[:30])
        file.flush()
        assert reader.new_events() == []
        file.write(line[30:])
    assert reader.new_events() == [POOL]
    assert reader.new_events() == []
    assert reader.num_rows == 2


def _append_many(path: Path, role: Role, num_rows: int) -> None:
    journal = Journal(path)
    for step in range(num_rows):
        journal.record(replace(TRAIN, role=role, step=step))


def test_processes_append_to_one_journal_without_mixing_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    spawn = multiprocessing.get_context("fork")
    writers = [
        spawn.Process(target=_append_many, args=(path, role, 150))
        for role in ("student", "control")
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = read_journal(path)
    assert len(rows) == 300
    for role in ("student", "control"):
        assert [
            row.step for row in rows if isinstance(row, TrainEvent) and row.role == role
        ] == list(range(150))


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot append"):
        Journal(tmp_path / "absent" / "journal.jsonl").record(START)


class FullDisk(SystemFiles):
    """A disk that is full for the next so many writes, or syncs; a write that is refused gets as
    far as its first bytes."""

    def __init__(self, *, writes: int = 0, syncs: int = 0, error: int = errno.ENOSPC) -> None:
        self._left, self._error = {"write": writes, "sync": syncs}, error

    def write(self, descriptor: int, data: Buffer) -> None:
        if self._left["write"]:
            super().write(descriptor, bytes(data)[:7])
        self._refuse("write")
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._refuse("sync")
        super().sync(descriptor)

    def _refuse(self, call: str) -> None:
        if self._left[call]:
            self._left[call] -= 1
            raise OSError(self._error, os.strerror(self._error))


class StandingClock:
    """A clock that stands still but for pauses."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def _patient(journal: Journal, clock: StandingClock, told: list[str]) -> PatientTracker:
    return PatientTracker(
        tracker=journal,
        tell=lambda _, why: told.append(why),
        pause=clock.pause,
        clock=clock,
        wall=clock,
    )


@pytest.mark.parametrize("call", ["writes", "syncs"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_row_waits_while_the_disk_is_full_and_comes_once_behind_what_others_wrote_meanwhile(
    tmp_path: Path, call: str, error: int
) -> None:
    path, clock, told = tmp_path / "journal.jsonl", StandingClock(), list[str]()
    journal = Journal(path, files=FullDisk(**{call: 12}, error=error))
    Journal(path).record(START)
    whole = path.read_bytes()
    with pytest.raises(StoreUnavailable, match=r"journal\.jsonl: .*; make room"):
        journal.record(TRAIN)
    assert path.read_bytes() == whole
    Journal(path).record(POOL)
    _patient(journal, clock, told).record(replace(TRAIN, time=0.0))
    assert read_journal(path) == [START, POOL, replace(TRAIN, time=1000.0)]  # when it happened
    assert 1005.0 < clock.now < 1060.0
    (why,) = told
    assert str(path) in why


def test_a_row_that_finds_no_room_for_half_an_hour_is_given_up(tmp_path: Path) -> None:
    path, clock = tmp_path / "journal.jsonl", StandingClock()
    with pytest.raises(StoreUnavailable, match="after 1800 s of waiting it is given up"):
        _patient(Journal(path, files=FullDisk(writes=10**6)), clock, []).record(TRAIN)
    assert read_journal(path) == []


def test_a_journal_that_may_not_be_written_is_not_waited_for(tmp_path: Path) -> None:
    clock = StandingClock()
    with pytest.raises(StoreError, match="give write access"):
        _patient(
            Journal(tmp_path / "journal.jsonl", files=FullDisk(writes=1, error=errno.EACCES)),
            clock,
            [],
        ).record(TRAIN)
    assert clock.now == 1000.0


def test_a_run_that_has_not_begun_has_no_rows(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "journal.jsonl") == []


def test_of_steps_taken_again_the_last_one_counts() -> None:
    steps = [1, 2, 3, 4, 3, 4, 5]
    rows = [replace(TRAIN, step=step, loss=float(i)) for i, step in enumerate(steps)]
    control = replace(TRAIN, role="control", step=2, loss=99.0)
    latest = latest_train_events([START, *rows[:2], control, *rows[2:]], "student")
    assert [(row.step, row.loss) for row in latest] == [
        (1, 0.0),
        (2, 1.0),
        (3, 4.0),
        (4, 5.0),
        (5, 6.0),
    ]
    assert latest_train_events([START, *rows, control], "control") == [control]


def test_no_secret_reaches_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record(replace(START, command=f"HF_TOKEN={SECRET} stillhouse run x.toml"))
    journal.record(EndEvent("failed", 1.0, f"GET https://me:{SECRET}@host: 403"))
    assert b"s3cr3t" not in journal.path.read_bytes()


def _wandb_records(path: Path) -> list[Any]:
    """All of a finished run's. W&B's service writes the last of them after `finish` has
    returned."""
    deadline = time.monotonic() + 30
    while (
        not (records := _records_so_far(path.read_bytes()))
        or records[-1].WhichOneof("record_type") != "exit"
    ):
        assert time.monotonic() < deadline, "the file has no end"
        time.sleep(0.02)
    return records


def _records_so_far(data: bytes) -> list[Any]:
    """Of a .wandb file: 7 bytes of header, then LevelDB's log framing in blocks of 32 KiB, crc32
    over type and data."""
    at, whole, records = 7, b"", list[Any]()
    wandb: Any = wandb_internal_pb2
    assert data[:4] == b":W&B"
    while at < len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        if len(data) - at < 7:
            break
        crc, length, part = struct.unpack_from("<IHB", data, at)
        body = data[at + 7 : at + 7 + length]
        if len(body) < length:
            break
        assert crc == zlib.crc32(bytes([part]) + body)
        at += 7 + length
        whole = body if part in (1, 2) else whole + body
        if part in (1, 4):
            records.append(wandb.Record.FromString(whole))
    return records


def _history(records: list[Any]) -> list[dict[str, object]]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]


def _summary(records: list[Any]) -> dict[str, object]:
    updates = [update for record in records for update in record.summary.update]
    return {
        update.key or "/".join(update.nested_key): json.loads(update.value_json)
        for update in updates
    }


OFFLINE = TrackingSection(wandb="offline")


def _mirror(
    run_dir: Path,
    rows: Iterable[RunEvent],
    *,
    config: Any = None,
    section: TrackingSection = OFFLINE,
) -> list[Path]:
    """Feed rows to a view as a driver does; the .wandb files of the run directory, oldest first."""
    with WandbView(section, run_dir, config=config or {}, run_id="7e57ed01") as view:
        for row in rows:
            view.record(row)
        assert view.url is None
    return sorted(
        run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    )


def test_the_wandb_file_holds_what_the_journal_holds(tmp_path: Path) -> None:
    more = [replace(TRAIN, step=step, loss=1.0 / step) for step in range(2, 40)]
    pools = [replace(POOL, published=n) for n in range(3, 8)]
    [path] = _mirror(tmp_path, [*ROWS[:-1], *more, *pools, ROWS[-1]])
    records = _wandb_records(path)
    history = _history(records)
    assert [row["student/loss"] for row in history if "student/loss" in row] == [
        2.5,
        *(1.0 / step for step in range(2, 40)),
    ]
    assert [row["pool/published"] for row in history if "pool/tokens_per_s" in row] == [
        2,
        3,
        4,
        5,
        6,
        7,
    ]
    [chunk] = [row for row in history if "chunk/kept_mass" in row]
    assert (chunk["chunk/kept_mass"], chunk["chunk/codec_kl"], chunk["chunk/duplicate"]) == (
        0.97,
        3e-6,
        False,
    )
    [control] = [row for row in history if "control/cross_entropy" in row]
    assert control["control/cross_entropy"] == 3.5
    assert {"teacher/seconds_to_ready", "student_checkpoint/num_bytes", "attempt"} <= {
        name for row in history for name in row
    }
    [scored] = [row for row in history if "eval/student/kl" in row]
    assert (scored["student/step"], scored["eval/student/kl"]) == (4, 0.875)
    summary = _summary(records)
    assert summary["eval/student/cross_entropy"] == 3.41
    assert summary["eval/teacher/cross_entropy"] == 3.05
    assert summary["outcome"] == "done"
    axes = {
        record.metric.glob_name: record.metric.step_metric
        for record in records
        if record.metric.glob_name
    }
    assert axes["student/*"] == axes["eval/student/*"] == "student/step"
    assert axes["chunk/*"] == "pool/published"


def test_a_resumed_run_keeps_its_wandb_id_and_its_rows_keep_their_numbers(tmp_path: Path) -> None:
    """Those of a later version, which are left out, keep theirs."""
    before = [*ROWS[:4], NewerEvent("weather", time=1009.0), TRAIN]
    after = [replace(START, attempt=2), replace(TRAIN, step=1), replace(TRAIN, step=2)]
    _mirror(tmp_path, before)
    first, second = (_wandb_records(path) for path in _mirror(tmp_path, [*before, *after]))
    runs = [
        record.run
        for records in (first, second)
        for record in records
        if record.WhichOneof("record_type") == "run"
    ]
    assert [run.run_id for run in runs] == ["7e57ed01"] * 2
    assert all(run.resume for run in runs)
    assert [row["_step"] for row in _history(first)] == [0, 1, 2, 3, 5]
    assert [row["_step"] for row in _history(second)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [row["attempt"] for row in _history(second) if "attempt" in row] == [1, 2]


def test_no_secret_reaches_any_file_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "5ec7e7" * 7)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "argv", ["stillhouse", f"--token={SECRET}"])
    config = {
        "store": {"url": f"s3://me:{SECRET}@bucket"},
        "api_key": SECRET,
        "student": {"block_tokens": 64},
    }
    rows = [
        replace(START, command=f"HF_TOKEN={SECRET} stillhouse"),
        EndEvent("failed", 1.0, f"token={SECRET}", time=1.0),
    ]
    [path] = _mirror(tmp_path, rows, config=config)
    print(SECRET)
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert path.read_bytes() in written
    assert b"s3cr3t" not in written
    assert b"5ec7e7" not in written
    assert b"block_tokens" in written
    assert "s3cr3t" in capsys.readouterr().out


def test_auto_without_a_key_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    assert len(_mirror(tmp_path, [START], section=TrackingSection(wandb="auto"))) == 1


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_an_unreachable_server_means_offline_for_auto_and_a_refusal_for_online(
    tmp_path: Path, mode: str
) -> None:
    program = (
        "import pathlib, sys\n"
        "from stillhouse.config import TrackingSection\n"
        "from stillhouse.tracking import WandbView\n"
        "WandbView(TrackingSection(wandb=sys.argv[1]), pathlib.Path(sys.argv[2]), config={}, "
        "run_id='abc', init_timeout_s=1.0).close()\n"
    )
    environment = {
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, mode, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    offline = list(tmp_path.glob("wandb/offline-run-*-abc"))
    if mode == "auto":
        assert done.returncode == 0, done.stderr
        assert len(offline) == 1
        assert done.stderr.startswith("W&B cannot be reached")
        assert f"go to {tmp_path / 'wandb'}" in done.stderr
    else:
        assert "UserError: W&B cannot be reached" in done.stderr
        assert not offline


def test_a_broken_wandb_never_breaks_the_run(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, wandb\n"
        "from stillhouse.config import TrackingSection\n"
        "from stillhouse.tracking import EndEvent, PoolEvent, WandbView\n"
        "view = WandbView(TrackingSection(wandb='offline'), pathlib.Path(sys.argv[1]), config={}, "
        "run_id='abc')\n"
        "wandb.teardown()\n"
        "view.record(PoolEvent(1, 8, 3, 4, 1.0, 0.0, 0)); view.record(EndEvent('done', 1.0, '')); "
        "view.close()\n"
        "print('the run goes on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "the run goes on" in done.stdout, done.stderr
    assert "the journal goes on" in done.stderr


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_off_a_terminal_is_one_plain_line_in_ten_seconds_and_a_last_one() -> None:
    clock, text = _Clock(), io.StringIO()
    with ProgressView(Console(file=text, width=60), clock=clock) as view:
        view.record(START)
        for step in range(1, 26):
            clock.now = float(step)
            view.record(replace(POOL, published=step // 4, time=clock.now))
            view.record(replace(TRAIN, step=step, time=clock.now))
    lines = text.getvalue().splitlines()
    assert len(lines) == 4  # at 0, 10 and 20 s, and at the end
    assert "\x1b" not in text.getvalue()
    assert "teachers 6/8 chunks" in lines[-1]
    assert "student 25/10 steps" in lines[-1]


def test_while_machines_are_on_their_way_it_says_what_is_missing() -> None:
    text = io.StringIO()
    with ProgressView(Console(file=text, width=200), clock=_Clock()) as view:
        view.record(WaitEvent("GPU: 8 needed (8 teachers), 0 in the cluster"))
    assert (
        "waiting for machines to join the cluster: GPU: 8 needed (8 teachers), 0 in the cluster | "
        "student:" in text.getvalue()
    )


def test_a_process_that_stood_still_is_named_with_what_it_was_at() -> None:
    clock, text = _Clock(), io.StringIO()
    with ProgressView(Console(file=text, width=60), clock=clock) as view:
        view.record(StallEvent("teacher", 3, 0, "work", 301.4, "", 12))
        clock.now += 61.0
        view.record(StallEvent("student", 1, 7, "reading", 300.6, "File loader.py, line 1", 12))
        clock.now += 61.0
        view.record(StallEvent("student", 1, 8, "step", 300.6, ""))
    assert text.getvalue().splitlines() == [
        "teacher 3 stood still for 301 s (work, chunk 12): it is killed and replaced",
        "student, rank 1, step 7, stood still for 301 s (reading, chunk 12): it is killed and "
        "replaced",
        "student, rank 1, step 8, stood still for 301 s (step): it is killed and replaced",
    ]


def test_what_a_store_keeps_waiting_is_said_once_a_minute() -> None:
    clock, text = _Clock(), io.StringIO()
    with ProgressView(Console(file=text, width=60), clock=clock) as view:
        for second in range(130):
            clock.now = float(second)
            view.record(
                OutageEvent(
                    f"student, rank {second}",
                    61.0,
                    "cannot read a in s3://bucket: it cannot be reached",
                )
            )
        clock.now = 200.0
        view.record(DelayEvent("student", 5, 0, "cannot write b in s3://bucket: it is too busy"))
    assert text.getvalue().splitlines() == [
        "student, rank 0 has waited for 61 s: cannot read a in s3://bucket: it cannot be reached",
        "student, rank 60 has waited for 61 s: cannot read a in s3://bucket: it cannot be reached",
        "student, rank 120 has waited for 61 s: cannot read a in s3://bucket: it cannot be reached",
        "the student's checkpoint of step 5 cannot be written yet: cannot write b in s3://bucket: "
        "it is too busy",
    ]


def test_a_student_that_reads_a_full_store_has_no_teachers_at_work() -> None:
    text = io.StringIO()
    with ProgressView(Console(file=text), clock=_Clock()) as view:
        view.record(START)
        view.record(TRAIN)
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("teachers: starting | student: waiting for its first step")
    assert lines[-1].startswith("no teachers at work | student 1/10 steps")


def test_what_is_begun_and_counts_nothing_is_told_with_its_time() -> None:
    clock, text = _Clock(), io.StringIO()
    with ProgressView(Console(file=text, width=60), clock=clock) as view:
        for seconds, event in (
            (1000, START),
            (1001, PhaseEvent("run", "starting Ray", time=1001.0)),
            (1062, PhaseEvent("teacher", "loading", time=1030.0)),
            (1072, PhaseEvent("teacher", "proving", time=1070.0)),
            (1082, replace(ROWS[1], time=1082.0)),
            (1092, PhaseEvent("student", "loading", time=1031.0)),
            (1102, replace(POOL, replicas=1, time=1102.0)),
            (1112, replace(TRAIN, time=1112.0)),
            (1122, PhaseEvent("control", "loading", time=1121.0)),
            (1132, replace(TRAIN, role="control", time=1132.0)),
            (1133, PhaseEvent("run", "evaluating", time=1133.0)),
        ):
            clock.now = float(seconds)
            view.record(event)
    beginnings = [
        line.split(", window")[0].split(" steps")[0] for line in text.getvalue().splitlines()
    ]
    assert beginnings == [
        "teachers: starting | student: waiting for its first step",
        "starting Ray, 0:00 | teachers: starting | student: waiting for its first step",
        "teachers: loading, 0:32, 0 of 2 ready | student: waiting for its first step",
        "teachers: proving, 0:02, 0 of 2 ready | student: waiting for its first step",
        "teachers: proving, 0:12, 1 of 2 ready | student: waiting for its first step",
        "teachers: proving, 0:22, 1 of 2 ready | student: loading, 1:01",
        "teachers 2/8 chunks, 3 in flight",
        "teachers 2/8 chunks, 3 in flight",
        "teachers 2/8 chunks, 3 in flight",
        "teachers 2/8 chunks, 3 in flight",
        "evaluating, 0:00 | teachers 2/8 chunks, 3 in flight",
    ]
    assert "control 1/10 steps" in text.getvalue().splitlines()[-1]  # what there was at the end


def test_on_a_terminal_the_time_of_a_phase_goes_on_between_events() -> None:
    clock, text = _Clock(), io.StringIO()
    with ProgressView(Console(file=text, force_terminal=True, width=80), clock=clock) as view:
        clock.now = 1000.0
        view.record(PhaseEvent("run", "evaluating", time=1000.0))
        clock.now = 1031.0
        view.tick()
    assert "evaluating, 0:31" in text.getvalue()
    assert "student" not in text.getvalue()  # of a command that only evaluates


def test_speeds_are_of_the_last_minute_and_not_of_the_last_event() -> None:
    clock, text = _Clock(), io.StringIO()
    with ProgressView(Console(file=text, width=200), clock=clock) as view:
        for second in range(0, 121, 10):
            clock.now = float(second)
            view.record(
                replace(POOL, tokens_per_s=700.0 if second in (70, 120) else 0.0, time=clock.now)
            )
            fast = second != 120
            view.record(
                replace(TRAIN, num_tokens=1000, seconds=1.0 if fast else 5.0, time=clock.now)
            )
    last = text.getvalue().splitlines()[-1]
    assert "window 4, 200 tokens/s" in last  # 14,000 tokens in 70 s
    assert "loss 2.500, 636 tokens/s" in last  # 7,000 tokens in 11 s


def test_bars_fit_the_eighty_columns_of_a_terminal() -> None:
    text = io.StringIO()
    large = replace(
        POOL, published=123_456, needed=345_678, in_flight=128, window_chunks=4096, replicas=64
    )
    with ProgressView(Console(file=text, force_terminal=True, width=80), clock=_Clock()) as view:
        view.record(replace(START, total_steps=100_000))
        view.record(replace(large, published=0, tokens_per_s=0.0, time=0.0))
        view.record(replace(large, tokens_per_s=1_234_567.0, time=86_400.0))
        view.record(replace(TRAIN, step=99, tokens_per_s=123_456.0))
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in text.getvalue().splitlines()]
    assert all(len(line) <= 80 for line in lines)
    assert "teachers 123456/345678 chunks " in text.getvalue()  # with its details below
    assert "128 in flight, window 4096, 1,234,567 tokens/s, ETA " in text.getvalue()
    assert (
        "student 99/100000 steps, loss 2.500, 250 tokens/s, waiting 25%, ETA ?" in text.getvalue()
    )


def test_progress_tells_pace_and_waiting() -> None:
    clock, text = _Clock(), io.StringIO()
    with ProgressView(Console(file=text), clock=clock) as view:
        view.record(START)
        for i in range(3):
            view.record(replace(POOL, published=2 * i, time=1000.0 + 60 * i))
            view.record(
                replace(TRAIN, step=1 + i, seconds=4.0, data_wait_s=1.0, time=1000.0 + 10 * i)
            )
    last = text.getvalue().splitlines()[-1]
    assert "1,234 tokens/s, ETA 2:00" in last  # 4 of 8 chunks in 120 s
    assert "waiting 25%, ETA 1:10" in last  # 7 steps of 10 s


def test_progress_says_when_the_students_loss_has_a_constant() -> None:
    text = io.StringIO()
    with ProgressView(Console(file=text), clock=_Clock(), every_s=0.0) as view:
        for row in (replace(START, loss_constant=True), TRAIN, replace(TRAIN, role="control")):
            view.record(row)
    _, student, control = text.getvalue().splitlines()
    assert "loss + constant 2.500, 250 tokens/s" in student
    assert "loss 2.500, 250 tokens/s" in control


def test_progress_tells_the_newest_held_out_score_of_the_role_that_trains() -> None:
    clock, text = _Clock(), io.StringIO()
    with ProgressView(Console(file=text), clock=clock, every_s=0.0) as view:
        for row in (START, TRAIN, replace(HELDOUT, kl=0.9), replace(HELDOUT, kl=0.8)):
            view.record(row)
        view.record(replace(TRAIN, role="control"))
    assert [line.partition(", loss 2.500")[2][:19] for line in text.getvalue().splitlines()] == [
        "",
        ", 250 tokens/s, wai",
        ", held-out KL 0.900",
        ", held-out KL 0.800",
        ", 250 tokens/s, wai",
    ]


def test_progress_on_a_terminal_shows_both_bars_side_by_side() -> None:
    text = io.StringIO()
    with ProgressView(Console(file=text, force_terminal=True, width=140), clock=_Clock()) as view:
        for row in ROWS:
            view.record(row)
    lines = text.getvalue().splitlines()
    assert any("teachers 2/8 chunks" in line and "control 1/10 steps" in line for line in lines)
    assert any("3 in flight, window 4" in line and "waiting 25%" in line for line in lines)
