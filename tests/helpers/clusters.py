"""A Ray cluster whose nodes are machines with addresses of their own, that can be killed, cut off
and joined by new ones.

The cluster belongs to a process of its own (`python -m helpers.clusters`) on the first machine,
since one process can be attached to one cluster only, and a test's may be to another. It ends with
its input, and ends the cluster.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil

from helpers.commands import answer_of, answers_to, end_with_its_input
from helpers.networks import Machine, inside

_PATIENCE_S = 120.0
_LOOK_EVERY_S = 0.02
# a node that cannot be reached is dead within eight seconds, and not after a minute; a busy one is
# not
_SOON = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 4,
}
_PORT = 6380


class RayMachines:
    """The first machine to join is the head."""

    def __init__(self, head: Machine) -> None:
        self.address = f"{head.address}:{_PORT}"
        self.raylets: dict[str, int] = {}  # machine -> process id
        with inside(head.namespace):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "helpers.clusters"],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    def join(
        self,
        machine: Machine,
        *,
        num_cpus: int,
        resources: Mapping[str, float],
        environment: Mapping[str, str],
    ) -> None:
        """A new Ray node on the machine; what runs there has the environment. Returns when the
        cluster knows it."""
        request = {
            "namespace": str(machine.namespace),
            "node": {
                "node_ip_address": machine.address,
                "num_cpus": num_cpus,
                "resources": dict(resources),
                "env_vars": dict(environment),
            },
        }
        self.raylets[machine.name] = answer_of(self._process, request)["raylet"]

    def kill_node(self, name: str) -> None:
        """SIGKILL the raylet of a machine; its workers end by themselves."""
        os.kill(self.raylets.pop(name), signal.SIGKILL)

    def workers(self, name: str, title: str) -> list[psutil.Process]:
        """The processes of a machine's node whose title begins so, such as 'ray::_TeacherActor',
        the eldest first, once there are any."""
        deadline = monotonic() + _PATIENCE_S
        while not (found := self._titled(name, title)):
            assert monotonic() < deadline, f"no {title} on {name}"
            sleep(_LOOK_EVERY_S)
        return found

    def _titled(self, name: str, title: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.raylets[name]).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
                if process.cmdline()[0].startswith(title):
                    found.append((process.create_time(), process.pid, process))
        return [process for _, _, process in sorted(found)]

    def lose(self) -> None:
        """SIGKILL every process of the cluster: the head, the nodes and all that runs there."""
        owner = psutil.Process(self._process.pid)
        for process in (*owner.children(recursive=True), owner):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.communicate(timeout=_PATIENCE_S)  # waits, and closes the pipes
        self.raylets.clear()

    def is_lost(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        if not self.is_lost():
            end_with_its_input(self._process)


def main() -> None:
    from ray.cluster_utils import Cluster

    answers = answers_to()
    cluster = Cluster()
    try:
        for line in sys.stdin:
            request = json.loads(line)
            with inside(Path(request["namespace"])):
                node = cluster.add_node(
                    **_settings(request["node"], head=cluster.head_node is None)
                )
            print(
                json.dumps({"raylet": node.all_processes["raylet"][0].process.pid}),
                file=answers,
                flush=True,
            )
    finally:
        cluster.shutdown()


def _settings(asked: dict[str, Any], *, head: bool) -> dict[str, Any]:
    settings = asked | {"object_store_memory": 80 << 20, "include_log_monitor": False}
    if head:
        settings |= {"gcs_server_port": _PORT, "include_dashboard": False, "_system_config": _SOON}
    return settings


if __name__ == "__main__":
    main()
