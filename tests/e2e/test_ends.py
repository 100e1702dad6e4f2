"""However a command on a cluster of its own ends, it ends in one line, with a row in its journal,
and leaves nothing of Ray behind."""

import os
import re
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shutil import rmtree
from time import monotonic, sleep

import boto3
import psutil
import pytest

from helpers.command import config_of
from helpers.commands import CommandServer
from helpers.faults import FaultyS3, publications
from helpers.world import TinyWorld
from stillhouse.pipeline import Plan
from stillhouse.tracking import EndEvent, RunEvent, TrainEvent, read_journal

PATIENCE_S = 100.0
LOOK_EVERY_S = 0.05
CONTROL = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")
OUR_LAST_WORDS = "interrupted; the same command goes on from here"


@pytest.fixture
def rays_place() -> Iterator[Path]:
    """Where commands make directories for Ray: near the root, since the path of a socket is
    short."""
    place = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    yield place
    rmtree(place, ignore_errors=True)


def rows_of(plan: Plan) -> list[RunEvent]:
    path = plan.run_dir / "journal.jsonl"
    return read_journal(path) if path.exists() else []


def is_held(s3: FaultyS3, name: str) -> bool:
    return any(f"/{name}/" in request.path for request in s3.held)


def until(condition: Callable[[], bool], *, words: Callable[[], str]) -> None:
    deadline = monotonic() + PATIENCE_S
    while not condition():
        assert monotonic() < deadline, words()
        sleep(LOOK_EVERY_S)


def kill(pid: int, *names: str) -> None:
    """SIGKILL the process of a command's cluster whose command line begins or ends so."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            first = "".join(process.cmdline()[:1])
            if first.startswith(names) or first.endswith(names):
                found.append(process)
    (victim,) = found
    victim.kill()


@pytest.fixture
def faulty_s3(s3_endpoint: str) -> Iterator[FaultyS3]:
    with FaultyS3(s3_endpoint) as proxy:
        yield proxy


@pytest.mark.timeout(600)
def test_a_command_whose_head_or_raylet_dies_ends_in_one_line_and_a_row(
    tiny_world: TinyWorld,
    commands: CommandServer,
    faulty_s3: FaultyS3,
    s3_endpoint: str,
    rays_place: Path,
    tmp_path: Path,
) -> None:
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="cognac")
    faulty_s3.hold(publications())  # so that neither is done before its end
    surroundings = {"AWS_ENDPOINT_URL": faulty_s3.url, "RAY_TMPDIR": str(rays_place)}
    victims = {"gcs_server": "/gcs_server", "raylet": "/raylet"}
    plans = {
        name: tiny_world.plan(
            tmp_path / name, store={"url": f"s3://cognac/{name}"}, cluster={"num_cpus": 2}
        )
        for name in victims
    }
    started = {
        name: commands.start(
            "produce",
            config_of(plan),
            "--run-dir",
            plan.run_dir,
            log=tmp_path / f"{name}.log",
            environment=surroundings,
        )
        for name, plan in plans.items()
    }
    for name, command in started.items():
        until(partial(is_held, faulty_s3, name), words=command.words)
        kill(command.pid, victims[name])
    for name, plan in plans.items():
        command = started[name]
        assert command.wait(timeout_s=45.0) == 1, command.words()
        last = rows_of(plan)[-1]
        assert isinstance(last, EndEvent), command.words()
        assert last.outcome == "failed"
        assert "the cluster's head is gone" in last.message
        assert command.words().splitlines()[-1] == f"error: {last.message}"
        assert "Traceback" not in command.words()
    assert list(rays_place.iterdir()) == []


@dataclass
class Terminal:
    """A command in a pseudo-terminal, and what is on its screen."""

    pid: int
    _descriptor: int
    _written: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, *command: str | Path, environment: dict[str, str]) -> "Terminal":
        pid, descriptor = os.forkpty()
        if pid == 0:
            try:
                # the background of a shell ignores it, and hands that on
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.execve(command[0], [str(word) for word in command], environment)
            finally:
                os._exit(99)
        return cls(pid, descriptor)

    def screen(self) -> str:
        """The text that was written to it, without colours and moves of the cursor."""
        with suppress(OSError):  # its other end is closed
            while select.select([self._descriptor], [], [], 0)[0] and (
                data := os.read(self._descriptor, 1 << 16)
            ):
                self._written += data
        return CONTROL.sub("", self._written.decode(errors="replace").replace("\r", "\n"))

    def press(self, key: bytes) -> None:
        os.write(self._descriptor, key)

    def code(self) -> int | None:
        """Its exit code, once it has one."""
        self.screen()
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    def close(self) -> None:
        os.close(self._descriptor)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.mark.timeout(600)
def test_a_run_outlives_its_coordinator_and_ends_by_one_ctrl_c_in_one_line(
    tiny_world: TinyWorld, rays_place: Path, tmp_path: Path
) -> None:
    endless = {"max_steps": 5000, "epochs": 5000, "checkpoint_every_steps": 5000}
    plan = tiny_world.plan(
        tmp_path / "run",
        store={"url": str(tmp_path / "store")},
        student=endless,
        cluster={"num_cpus": 4},
    )
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "RAY_TMPDIR": str(rays_place),
        "TERM": "xterm",
    }
    command = Path(sys.executable).parent / "stillhouse"
    terminal = Terminal.of(
        command, "run", config_of(plan), "--run-dir", plan.run_dir, environment=environment
    )
    sessions: set[Path] = set()

    def num_steps() -> int:
        terminal.screen()
        sessions.update(rays_place.glob("**/session_2*"))
        return sum(isinstance(event, TrainEvent) for event in rows_of(plan))

    try:
        until(lambda: num_steps() >= 2, words=terminal.screen)
        kill(terminal.pid, "ray::Coordinator")
        before = num_steps()
        until(lambda: num_steps() >= before + 5, words=terminal.screen)
        num_shown = len(terminal.screen())
        terminal.press(b"\x03")
        code: int | None = None

        def ended() -> bool:
            nonlocal code
            sessions.update(rays_place.glob("**/session_2*"))
            code = terminal.code()
            return code is not None

        until(ended, words=terminal.screen)
        assert code == 130, terminal.screen()
        # Ray may have shown one of the coordinator that was killed
        assert "Traceback" not in terminal.screen()[num_shown:]
        assert terminal.screen().rstrip().endswith(OUR_LAST_WORDS), terminal.screen()[
            -1000:
        ].encode()
        last = rows_of(plan)[-1]
        assert isinstance(last, EndEvent)
        assert last.outcome == "interrupted"
        assert len(sessions) == 1, sessions  # none was started on the way out
        assert list(rays_place.iterdir()) == []
    finally:
        terminal.close()
