"""Compatibility with Ray: each private name of Ray's that is relied on, behind a function that says
what for.

No other module of the package uses a private name of Ray's. Ray's version is capped in
pyproject.toml; tests/unit/test_ray_compat.py says what has to hold before the cap is raised.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray._private.node
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)

TrainerT = TypeVar("TrainerT")

_PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION in Ray's autoscaler.proto


@dataclass(frozen=True, slots=True)
class LocalNode:
    """This machine's part of the attached cluster: the addresses at which the head (GCS) and this
    machine's raylet listen."""

    gcs_address: str  # host:port
    raylet_socket: Path


def local_node() -> LocalNode | None:
    """The node that this process is attached through; None for a client by ray://. No public call
    names the raylet's socket."""
    node: Any = ray._private.worker._global_node
    return None if node is None else LocalNode(node.gcs_address, Path(node.raylet_socket_name))


def start_options(directory: Path, *, failed_checks: int) -> dict[str, Any]:
    """Options for `ray.init`: the directory of the new cluster's files, and how many health checks
    in a row one of its nodes may fail."""
    return {
        "_temp_dir": str(directory),
        "_system_config": {"health_check_failure_threshold": failed_checks},
    }


@contextmanager
def on_loopback() -> Iterator[None]:
    """What Ray starts in this block listens at 127.0.0.1 alone, as Ray's own default is on systems
    for which it has no clusters."""
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    setting = os.environ.get(name)
    os.environ[name] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if setting is None:
            del os.environ[name]
        else:
            os.environ[name] = setting


@contextmanager
def without_log_monitor() -> Iterator[None]:
    """A node that Ray starts in this block has no log monitor, the process that sends the workers'
    logs to the driver: with `log_to_driver=False` nobody reads them. `ray.init` has no option."""
    node: Any = ray._private.node.Node
    start = node.start_log_monitor
    node.start_log_monitor = lambda _: None
    try:
        yield
    finally:
        node.start_log_monitor = start


def use_token_if_there_is_one() -> None:
    """Send this process's token to the cluster that it attaches to. Ray does so by itself only for
    the address "auto"."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def token_refusal(error: Exception) -> str | None:
    """Why `ray.init` could not attach for want of the cluster's token; None where it failed for
    another reason. Ray tells of a wrong token only in the cause of a ConnectionError."""
    if isinstance(error, ray.exceptions.AuthenticationError):
        return str(error).partition(". ")[0]
    return "it refuses this process's token" if "InvalidAuthToken" in str(error.__cause__) else None


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """The free resources of each live node, by id. Public calls give the sum over the cluster."""
    free: Mapping[str, Mapping[str, float]]
    free = ray._private.state.state.available_resources_per_node()
    return free


def total_resources() -> Mapping[str, Mapping[str, float]]:
    """All resources of each live node, by id."""
    return ray._private.state.state.total_resources_per_node()


def drain_deadlines_ms() -> Mapping[str, int]:
    """The nodes that are being drained, by id, each with its deadline in unix milliseconds; 0 where
    none was set."""
    return ray._private.state.state.get_draining_nodes()


def drain_node(node: str, *, detail: str, deadline_ms: int) -> None:
    """Drain a node because its machine will be taken away, as `ray drain-node` does."""
    raylet: Any = ray._raylet
    raylet.GcsClient(address=ray.get_runtime_context().gcs_address).drain_node(
        node, _PREEMPTION, detail, deadline_ms
    )


def kill_train_controllers() -> None:
    """Kill this job's Ray Train controllers: `fit` hands out no handle to its own, and ends in a
    thread by no other means."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    worker: Any = ray._private.worker.global_worker
    for actor, about in ray._private.state.state.actor_table(None, job, "ALIVE").items():
        if about["ActorClassName"] == "TrainController":
            worker.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)


def without_data_sets(trainer: type[TrainerT]) -> type[TrainerT]:
    """A trainer of Ray Train whose groups start no actor for data sets of Ray Data, of which they
    have none."""

    class WithoutDataSets(trainer):  # type: ignore[valid-type, misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if type(each).__name__ != "DatasetsCallback"]

    return WithoutDataSets
