"""Runs the command `stillhouse` in processes that are forked off one that has imported everything:
it begins at once.

The server is a process of its own (`python -m helpers.commands`), since forks want a process with
one thread. It ends with its input, and ends the commands that still run.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

import psutil

_LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Command:
    """One that was started."""

    pid: int
    log: Path
    _server: "CommandServer"

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait(timeout_s=30) == -signal.SIGKILL

    def has_ended(self) -> bool:
        return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)

    def wait(self, *, timeout_s: float) -> int:
        """Its exit code, or the negative number of the signal that ended it. It can be had once."""
        code = self._server.ask({"wait": self.pid, "timeout_s": timeout_s})["code"]
        assert code is not None, f"not done after {timeout_s:g} s: {self.words()}"
        return int(code)

    def words(self) -> str:
        """The end of what it wrote."""
        return self.log.read_text()[-3000:]


class CommandServer:
    """Commands run in the network namespace in which this was made; its environment is theirs, but
    for what they are given."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.commands"],
            env=os.environ | environment | {"PYTHONPATH": _import_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self, *arguments: str | Path, log: Path, environment: Mapping[str, str] | None = None
    ) -> Command:
        """Begin `stillhouse ARGUMENTS`; returns at once."""
        request = {
            "start": [str(argument) for argument in arguments],
            "log": str(log),
            "environment": dict(environment or {}),
        }
        return Command(self.ask(request)["pid"], log, self)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return answer_of(self._process, request)

    def close(self) -> None:
        end_with_its_input(self._process)


def _import_path() -> str:
    """That of this process, so that tests' helpers can be imported there too."""
    return os.pathsep.join(path for path in sys.path if path)


def answer_of(process: "subprocess.Popen[str]", request: dict[str, Any]) -> dict[str, Any]:
    """One question and one answer, each a line of JSON."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, f"{process.args!r} ended while it was asked for {request}"
    answer: dict[str, Any] = json.loads(line)
    return answer


def end_with_its_input(process: "subprocess.Popen[str]") -> None:
    """Close a server's input, and wait for it to end."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


def answers_to() -> IO[str]:
    """Where a server writes its answers; whatever else writes to standard output now writes to
    standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main() -> None:
    answers = answers_to()
    _import_everything()
    running: set[int] = set()
    try:
        for line in sys.stdin:
            request = json.loads(line)
            answer = _start(request, running) if "start" in request else _wait(request, running)
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def _import_everything() -> None:
    import ray.train.torch  # noqa: F401

    import stillhouse.pipeline
    import stillhouse.student.export  # noqa: F401


def _start(request: dict[str, Any], running: set[int]) -> dict[str, Any]:
    pid = os.fork()
    if pid == 0:
        try:
            os.environ |= request["environment"]
            if path := request["environment"].get("PYTHONPATH"):
                sys.path[:0] = path.split(os.pathsep)
            _become(request["start"], Path(request["log"]))
        finally:
            os._exit(99)  # never back into the server's loop
    running.add(pid)
    return {"pid": pid}


def _become(arguments: Sequence[str], log: Path) -> None:
    from stillhouse.cli.main import main

    os.setsid()
    # a shell has what it starts in the background ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.argv = ["stillhouse", *arguments]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(request: dict[str, Any], running: set[int]) -> dict[str, Any]:
    pid, deadline = request["wait"], monotonic() + request["timeout_s"]
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            running.discard(pid)
            return {"code": os.waitstatus_to_exitcode(status)}
        if monotonic() > deadline:
            return {"code": None}
        sleep(_LOOK_EVERY_S)


if __name__ == "__main__":
    main()
