"""Graders in processes of their own, so that a sample which hangs, crashes or takes too much memory
costs its score and no more.

A process has one grader for many samples, one after the other, on its main thread: math-verify's
alarms need that. It is killed at the end of a sample's time, and another one takes its place. None
outlives the process that started it.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

from stillhouse.config.graders import JsonSchemaSection, MathsSection, OwnSection
from stillhouse.errors import GraderError
from stillhouse.graders.base import Failure, Sample
from stillhouse.graders.identity import identity_of

_START_S = 300.0  # to import what it needs, on a machine that is busy
_MOST_ANSWER_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one process."""

    wall_s: float  # for one sample
    memory_bytes: int  # of address space


@dataclass(frozen=True, slots=True)
class Scorer:
    """What a process does: a function of a sample, or one that returns such a function when it is
    called with settings."""

    module: str
    function: str
    settings: Mapping[str, str] | None  # None: of a sample


class InProcesses:
    """A grader in processes, as many as samples are graded at one time."""

    def __init__(
        self, section: MathsSection | JsonSchemaSection | OwnSection, scorer: Scorer
    ) -> None:
        self._section, num_processes = section, section.num_processes
        limits = Limits(wall_s=section.wall_s, memory_bytes=section.memory_bytes)
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all = [_Process(scorer, limits) for _ in range(num_processes)]
        for process in self._all:
            self._idle.put(process)
        # the kernel ends a process together with the thread that started it: these stay
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="grader")

    @property
    def identity(self) -> Mapping[str, Any]:
        return identity_of(self._section)

    def grade(self, samples: Sequence[Sample]) -> list[float]:
        """A score for each sample, in order. Raises GraderError where no process can be started."""
        return list(self._threads.map(self._score, samples))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.end()

    def _score(self, sample: Sample) -> float:
        process = self._idle.get()
        try:
            return process.score(sample)
        finally:
            self._idle.put(process)


class _Process:
    """One process, or none before the first sample and after a kill."""

    def __init__(self, scorer: Scorer, limits: Limits) -> None:
        self._scorer, self._limits = scorer, limits
        self._child: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None  # to it and from it

    def score(self, sample: Sample) -> float:
        if self._child is None:
            self._start()
        answer = self._asked([*sample], within_s=self._limits.wall_s)
        if answer is None:
            return Failure("time", f"no score within {self._limits.wall_s:g} s")
        match answer:
            case {"score": score}:
                return float(score)
            case {"failed": str(reason), "detail": str(detail)}:
                return Failure(reason, detail)
            case _:
                return Failure("process", f"it ended: {answer.get('ended', 'without a word')}")

    def end(self) -> None:
        """Kill it, and what it started."""
        child, self._child = self._child, None
        if child is not None:
            _kill_group(child)
        if self._line is not None:
            self._line.close()

    def _start(self) -> None:
        # the process, and a line to it
        self._line, theirs = socket.socketpair()
        command = [sys.executable, "-m", "stillhouse.graders.child", str(theirs.fileno())]
        with theirs:
            try:
                self._child = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:  # no process is left on this machine
                raise self._not_started(str(error)) from None
        # what it is
        begin = {
            **asdict(self._scorer),
            "memory_bytes": self._limits.memory_bytes,
            "path": sys.path,
        }
        answer = self._asked(begin, within_s=_START_S)
        if answer is None or "ready" not in answer:
            self.end()
            found = answer or {"found": f"no answer in {_START_S:.0f} s"}
            raise self._not_started(" ".join(found.values()))

    def _not_started(self, found: str) -> GraderError:
        return GraderError(
            f"the process of the grader {self._scorer.module}:{self._scorer.function} cannot be "
            f"started: {found}; install what it needs on every machine, or raise its memory_bytes"
        )

    def _asked(self, values: Any, *, within_s: float) -> dict[str, Any] | None:
        """Its answer, a line of JSON. None, and the process is killed, where it gives none in
        time."""
        assert self._line is not None
        try:
            data = _exchanged(self._line, json.dumps(values).encode() + b"\n", within_s)
            answer: dict[str, Any] = json.loads(data)
            return answer
        except TimeoutError:
            self.end()
            return None
        except (OSError, ValueError):
            self.end()
            return {"ended": "without an answer"}


def _exchanged(line: socket.socket, data: bytes, within_s: float) -> bytes:
    """Send a line, and receive one. Raises TimeoutError at the end of the time, and OSError where
    the other side is gone or says too much."""
    end = monotonic() + within_s
    line.settimeout(within_s)
    line.sendall(data)
    answer = bytearray()
    while not answer.endswith(b"\n"):
        left_s = end - monotonic()
        if left_s <= 0:
            raise TimeoutError
        line.settimeout(left_s)
        part = line.recv(1 << 16)
        if not part or len(answer) > _MOST_ANSWER_BYTES:
            raise ConnectionError
        answer += part
    return bytes(answer)


def _kill_group(child: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
