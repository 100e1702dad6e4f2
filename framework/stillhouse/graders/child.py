"""The process of a grader: `python -m stillhouse.graders.child SOCKET`. See processes.py.

The first line that it receives says what it is, every other one is a sample; it answers each with a
line. Both are JSON.
"""

import ctypes
import importlib
import json
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from stillhouse.graders.base import Failure, Sample, failure_of

_PR_SET_PDEATHSIG = 1
_MOST_DETAIL_CHARACTERS = 1000


def main(descriptor: int) -> None:
    """Serve until the other side is gone."""
    # the kernel ends this process with the thread that started it, whatever this one does
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=descriptor) as line, line.makefile("rb") as lines:
        score: Callable[[Sample], float] | None = None
        for data in lines:
            values = json.loads(data)
            if score is None:
                try:
                    score = _prepared(values)
                    _answer(line, {"ready": True})
                except Exception as error:
                    _answer(line, {"cannot": f"{type(error).__name__}: {error}"})
                    return
            else:
                _answer(line, _graded(score, Sample(*values)))


def _prepared(begin: dict[str, Any]) -> Callable[[Sample], float]:
    """The function of a sample. Limits come after the imports, which are ours."""
    sys.path[:] = begin["path"]
    function = getattr(importlib.import_module(begin["module"]), begin["function"])
    if begin["settings"] is not None:
        function = function(**begin["settings"])
    limit = begin["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    scorer: Callable[[Sample], float] = function
    return scorer


def _graded(score: Callable[[Sample], float], sample: Sample) -> dict[str, Any]:
    try:
        found = score(sample)
        if isinstance(found, Failure):
            return _failed(found)
        return {"score": float(found)}
    except Exception as error:
        return _failed(failure_of(error))


def _failed(failure: Failure) -> dict[str, Any]:
    return {"failed": failure.reason, "detail": failure.detail[:_MOST_DETAIL_CHARACTERS]}


def _answer(line: socket.socket, values: dict[str, Any]) -> None:
    line.sendall(json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
