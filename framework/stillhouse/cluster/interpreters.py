"""A Python interpreter of its own for a pool (`teacher.python`, `writer.python`): what Ray is told,
and which machines have it.

Ray starts an interpreter that is missing, or whose Ray or Python is another, again and again
without end and without a word. So each machine is asked first, by a small task.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from platform import python_version_tuple
from typing import Any, NamedTuple

import ray

from stillhouse.cluster.processes import ask_node
from stillhouse.errors import ConfigError

_ANSWER_S = 60.0  # for an interpreter to start and import both, on a busy machine
_PROGRAM = """
from importlib.metadata import version
from json import dumps
from platform import python_version_tuple
import ray, stillhouse
print(dumps([".".join(python_version_tuple()[:2]), ray.__version__, version("stillhouse")]))
"""


class Versions(NamedTuple):
    """What two interpreters have to have in common to exchange values through Ray."""

    python: str  # without the last part
    ray: str
    stillhouse: str

    @classmethod
    def here(cls) -> "Versions":
        return cls(".".join(python_version_tuple()[:2]), version("ray"), version("stillhouse"))

    def __str__(self) -> str:
        return f"Python {self.python}, Ray {self.ray} and Stillhouse {self.stillhouse}"


def runtime_env_of(python: str) -> dict[str, Any]:
    """The `runtime_env` of an actor that this interpreter runs. Its folder comes first in PATH, as
    in an activated environment: libraries look there for programs that were installed with them."""
    folder = os.path.dirname(python)
    return {"py_executable": shlex.quote(python), "env_vars": {"PATH": f"{folder}:${{PATH}}"}}


def refusal(python: str, wanted: Versions) -> str | None:
    """Why this machine's interpreter of that path cannot run workers; None where it can."""
    try:
        done = subprocess.run(
            [python, "-c", _PROGRAM],
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except OSError as error:
        return f"it cannot be started ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"it did not import Stillhouse and Ray within {_ANSWER_S:g} s"
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"it cannot import Stillhouse and Ray ({last})"
    try:
        found = Versions(*json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        return "it is no Python"
    return None if found == wanted else f"found {found}"


class Interpreters:
    """The interpreters of one path on the machines of a cluster. `nodes` gives the machines that
    there are, as Ray describes them; each is asked once. `table`: the config's that names it."""

    def __init__(
        self, python: str, nodes: Callable[[], Iterable[Mapping[str, Any]]], *, table: str
    ):
        self._python, self._nodes, self._table = python, nodes, table
        self._asked: set[str] = set()  # nodes, by id
        self._waiting: dict[Any, str] = {}  # the address of its node, by the reference to an answer

    def require(self, *, timeout_s: float) -> None:
        """Raise ConfigError where a machine's interpreter cannot run workers.

        Machines that have joined since the last call are asked. Those that do not answer within the
        timeout are looked at again by the next call.
        """
        for node in self._nodes():
            if node["NodeID"] not in self._asked:
                self._asked.add(node["NodeID"])
                answer = ask_node(node["NodeID"], refusal, self._python, Versions.here())
                self._waiting[answer] = node["NodeManagerAddress"]
        if not self._waiting:
            return
        waiting = [*self._waiting]
        answered, _ = ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s)
        reasons = [(self._waiting.pop(answer), _reason(answer)) for answer in answered]
        refused = [f"{address}: {reason}" for address, reason in reasons if reason is not None]
        if refused:
            raise _refused(self._python, sorted(refused), table=self._table)


def require_here(python: str, *, table: str) -> None:
    """As `Interpreters.require`, for this machine alone, and without Ray."""
    reason = refusal(python, Versions.here())
    if reason is not None:
        raise _refused(python, [f"this machine: {reason}"], table=table)


def _refused(python: str, reasons: list[str], *, table: str) -> ConfigError:
    machines = "".join(f"\n  - {line}" for line in reasons)
    return ConfigError(
        f"{table}.python is {python}, which cannot run {table}s:{machines}\nWanted at this path of "
        f"every machine with {table}s: {Versions.here()}, as the command itself has. Install them "
        f"there, name another interpreter, or leave {table}.python out"
    )


def _reason(answer: Any) -> str | None:
    try:
        reason: str | None = ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        return f"it could not be asked ({error.cause})"
    except ray.exceptions.RayError:  # the machine has just gone
        return None
    return reason
