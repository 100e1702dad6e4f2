"""The Ray cluster: attach to one or start one, know what it has, and hand processes what they need to run on it.

What travels between processes here is small: cursors, chunk numbers, secrets. No tensor does.
"""

import logging
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stillhouse.cluster import machine
from stillhouse.cluster.environment import forbid_pickled_code, learn_secrets
from stillhouse.cluster.head_process import held_to, nobody_listens, required
from stillhouse.cluster.node import OBJECT_STORE_BYTES, require_unguessable
from stillhouse.cluster.placement import Crews, Placement, how_many_fit, placement, require_room, shortages
from stillhouse.cluster.preemption import Endpoints, Notice, NoticeWatch, local_sources
from stillhouse.cluster.ray_directory import base_directory, current_address, new_directory, ray_directory, remove_directory
from stillhouse.config import ClusterSection, NoticeSource
from stillhouse.errors import ConfigError, RunError, StillhouseError
from stillhouse.redaction import know

_NAMESPACE = "stillhouse"
_REACH_S = 10.0
_LOOK_EVERY_S = 1.0
_PATIENT_CHECKS = 100  # that one machine's own node may fail in a row, three seconds each: it may be busy, and is never cut off
_PREEMPTION = 2  # Ray's DRAIN_NODE_REASON_PREEMPTION
_DRAIN_S = 120.0  # for a node that is drained without a deadline
_END_S, _STACK_S = 30.0, 10.0
_OWN_HEAD_S, _HEAD_S = 1.0, 30.0  # that a head may be away; others' may be started again. Ray ends this process after 60


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a process needs to reach gated models; its repr shows nothing, and it travels as an argument, never in a config."""

    hub_token: str | None = field(repr=False)

    def adopt(self) -> None:
        """Make the secrets this process's own, where Hugging Face looks for them."""
        if self.hub_token is not None:
            os.environ["HF_TOKEN"] = self.hub_token
            know([self.hub_token])


def local_secrets() -> Secrets:
    """The hub token of the person who starts the run: HF_TOKEN, or what `hf auth login` stored."""
    from huggingface_hub import get_token

    return Secrets(hub_token=get_token())


def prepare_process(device: str, threads: int) -> None:
    """Settle a worker process before its first tensor: torch threads, DeepSpeed's accelerator, and no pickle in any checkpoint."""
    import torch

    learn_secrets()
    torch.set_num_threads(threads)
    os.environ["DS_ACCELERATOR"] = device
    forbid_pickled_code()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def metadata_endpoints() -> Endpoints:
    """Where this machine's cloud answers: at its usual address, or where the variables say that the cloud's own tools go by."""
    usual = Endpoints()
    gcp_host = os.environ.get("GCE_METADATA_HOST")
    return Endpoints(
        aws=os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or usual.aws,
        gcp=f"http://{gcp_host}" if gcp_host else usual.gcp,
        azure=usual.azure,
    )


def machine_notices(kind: NoticeSource, *, on_notice: Callable[[Notice], None] | None = None) -> NoticeWatch:
    """A watch over this machine's own end, to be entered in a process that runs on it. `kind` is `cluster.notices` of the config."""
    return NoticeWatch(local_sources(kind, metadata_endpoints()), on_notice=on_notice)


@contextmanager
def attached(section: ClusterSection) -> Iterator[dict[str, float]]:
    """Attach to the cluster that the section names, or start one on this machine; yields its resources by name.

    A cluster that this started ends with the block. Inside an already attached process (a test session) it is used as it is. Raises
    HeadGoneError where the cluster's head, or this machine's part of it, is gone before the block is done.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    with _own_cluster(section) if section.address is None else _others_cluster(section.address):
        learn_secrets()  # the cluster's token may be a new one
        yield ray.cluster_resources()


@contextmanager
def _own_cluster(section: ClusterSection) -> Iterator[None]:
    """A cluster of this machine alone: its ports are on loopback, and its files where no other user can enter."""
    machine.require(lacks(section))
    _require_token()
    directory = new_directory(base_directory(os.environ))
    try:
        _start(section.num_cpus, ray_directory(directory))
        with _until_shutdown(patience_s=_OWN_HEAD_S):
            yield
    finally:
        remove_directory(directory)


def lacks(section: ClusterSection) -> list[str]:
    """What this machine lacks to start the section's cluster, as sentences for the user; empty where it attaches to one."""
    return machine.for_ray(os.environ, num_cpus=section.num_cpus) if section.address is None else []


def remarks(section: ClusterSection) -> list[str]:
    """What is worth knowing of this machine where the section's cluster is started on it."""
    return machine.remarks(os.environ, object_store_bytes=OBJECT_STORE_BYTES) if section.address is None else []


def _start(num_cpus: int | None, directory: Path) -> None:
    """Raises RunError where Ray does not start."""
    try:
        with _on_loopback():
            _init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(directory),
                _system_config={"health_check_failure_threshold": _PATIENT_CHECKS},
            )
    except Exception as error:  # Ray has no class for it
        ray.shutdown()
        why = str(error).partition("\n")[0]
        raise RunError(
            f"Ray did not start on this machine ({why}); where the machine was too busy, the same command goes on later."
            " cluster.address attaches to a cluster that is there already"
        ) from error


@contextmanager
def _others_cluster(address: str) -> Iterator[None]:
    try:
        found = _resolved(address)
        _reach(found)
        logging.getLogger("ray").setLevel(logging.ERROR)  # as `_init` will
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray does for "auto", and for no other address
        _init(address=found)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `stillhouse node head`, or leave cluster.address out"
        ) from None
    except ray.exceptions.AuthenticationError as error:
        why = str(error).partition(". ")[0]
        raise ConfigError(
            f"the Ray cluster at {address!r} lets in who has its token ({why}); put the token of its head into RAY_AUTH_TOKEN, or a file"
            " that holds it into RAY_AUTH_TOKEN_PATH"
        ) from None
    with _until_shutdown(patience_s=_HEAD_S):
        yield


def _init(**options: Any) -> None:
    ray.init(**options, namespace=_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)


@contextmanager
def _until_shutdown(*, patience_s: float) -> Iterator[None]:
    here: Any = ray._private.worker._global_node
    try:
        if here is None:  # a client by ray://, which its server tells
            yield
            return
        host, _, port = here.gcs_address.rpartition(":")
        with (
            held_to(Path(here.raylet_socket_name)) as is_raylet_gone,
            required(lambda: is_raylet_gone() or nobody_listens(host.strip("[]"), int(port)), patience_s=patience_s),
        ):
            yield
    finally:
        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have what Ray starts in this block listen at 127.0.0.1 alone. Ray does so by itself on systems on which it knows no clusters."""
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    setting = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # in the processes that it starts, and in this one
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if setting is None:
            del os.environ[name]
        else:
            os.environ[name] = setting


def _resolved(address: str) -> str:
    """`auto` as host:port: RAY_ADDRESS, or what this machine was made part of. Ray itself would believe any process and any file."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        address = current_address(base_directory(os.environ)) or ""
    if address in ("", "local"):  # Ray would start one
        raise ValueError("this machine belongs to none" if not address else "that is no address")
    return address


def await_room(crews: Crews, section: ClusterSection, *, waiting: Callable[[str], None]) -> dict[str, float]:
    """The cluster's resources, once they suffice for these crews: machines of a cluster that was there before may still be on their way.

    A cluster that can grow is asked to. `waiting` hears what is missing once a second, and may raise. Raises ConfigError where it is still
    missing after `section.join_s`.
    """
    available = ray.cluster_resources()
    if section.address is not None and shortages(crews, available):
        deadline = monotonic() + section.join_s
        with _wanted(crews, available):
            while (missing := shortages(crews, available := ray.cluster_resources())) and monotonic() < deadline:
                waiting("; ".join(missing))
                sleep(_LOOK_EVERY_S)
    require_room(crews, available)
    return available


@contextmanager
def _wanted(crews: Crews, available: Mapping[str, float]) -> Iterator[None]:
    """For as long as the block and this process last, Ray's autoscaler, where there is one, sees that all of them want room."""
    wanted = placement_group([placement(section, available).times(1) for section, count in crews.values() for _ in range(count)])
    try:
        yield
    finally:
        remove_placement_group(wanted)


def call_remotely(function: Callable[..., Any], *arguments: object, where: Placement) -> Any:
    """Run a function in a process of its own on the cluster, wait for it, and return its (small) answer.

    An error that it raises arrives as itself. Raises RunError where its process died, and died again.
    """
    remote = ray.remote(function).options(
        num_cpus=where.num_cpus, num_gpus=where.num_gpus, resources=dict(where.resources) or None, max_retries=1
    )
    try:
        return ray.get(remote.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        cause = cause_of(error)
        raise cause from None if isinstance(cause, StillhouseError) else error
    except ray.exceptions.RayError as error:
        raise RunError(
            f"the process of `{function.__name__}` was lost ({error}); if its memory ran out, give it a larger machine, or smaller batches"
        ) from error


def settle_ray_train() -> None:
    """How Ray Train shall look after its ranks, before the first trainer is made. The user's own settings win."""
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead rank is seen that soon
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process for each life of a group: the driver watches for that
        "RAY_TRAIN_METRICS_ENABLED": "0",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def this_node() -> str:
    """Ray's id of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id()


def draining() -> dict[str, Notice]:
    """The nodes that Ray will take away, by id, with the end that was set for each."""
    found = ray._private.state.state.get_draining_nodes()
    return {node: Notice("ray", ms / 1e3 if ms else time() + _DRAIN_S, "the node is being drained") for node, ms in found.items()}


def drain(node: str, notice: Notice) -> None:
    """Let Ray start nothing more on a node whose machine will be taken away."""
    raylet: Any = ray._raylet  # what `ray drain-node` calls
    client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    client.drain_node(node, _PREEMPTION, f"{notice.source}: {notice.detail}", int(notice.deadline * 1e3))


def room_for(where: Placement) -> int:
    """How many such processes fit into what is free, on nodes that will stay."""
    return _room_in(ray._private.state.state.available_resources_per_node(), where)


def room_at_most(where: Placement) -> int:
    """How many would fit there if nothing else ran."""
    return _room_in(ray._private.state.state.total_resources_per_node(), where)


def _room_in(resources_by_node: Mapping[str, Mapping[str, float]], where: Placement) -> int:
    leaving = draining()
    return sum(how_many_fit(there, where) for node, there in resources_by_node.items() if node not in leaving)


def who_does_not_see(path: Path, crews: Collection[Placement]) -> list[str]:
    """The addresses of the other machines with resources for one of a crew on which there is no such file, or nobody who could tell."""
    resources = ray._private.state.state.total_resources_per_node()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != this_node()]
    fitting = [node for node in others if any(how_many_fit(resources.get(node["NodeID"], {}), crew) for crew in crews)]
    asked = {_ask(node["NodeID"], os.path.exists, path): node["NodeManagerAddress"] for node in fitting}
    answered, silent = ray.wait([*asked], num_returns=len(asked), timeout=_END_S) if asked else ([], [])
    return sorted(asked[answer] for answer in (*silent, *answered) if answer in silent or not _sees(answer))


def _sees(answer: Any) -> bool:
    try:
        return bool(ray.get(answer))
    except ray.exceptions.RayTaskError:
        return False
    except ray.exceptions.RayError:  # the machine has just gone
        return True


def stacks_of(pid: int, *, node: str) -> str | None:
    """Where a worker of ours on a node stands, empty where that cannot be read; None where it is gone."""
    return _answer(_ask(node, _stack_of, pid))


def end_process(pid: int, *, node: str) -> None:
    """Kill a worker of ours on a node, where it is still there."""
    _answer(_ask(node, _end_process, pid))


def _ask(node: str, function: Callable[..., Any], argument: object) -> Any:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=there).remote(argument)


def _answer(asked: Any) -> Any:
    try:
        return ray.get(asked, timeout=_END_S)
    except ray.exceptions.RayError:  # the node is gone, or as silent as the process: Ray's own health check sees to it
        return None


def _end_process(pid: int) -> None:
    process = _worker_process(pid)
    if process is not None:
        process.kill()


def _worker_process(pid: int) -> Any:
    import psutil

    try:
        process = psutil.Process(pid)
        return process if "".join(process.cmdline()[:1]).startswith("ray::") else None
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None


def _stack_of(pid: int) -> str | None:
    """By py-spy, which comes with Ray and can read a process that was stopped; it needs the right to trace others."""
    if _worker_process(pid) is None:
        return None
    command = [str(Path(sys.executable).parent / "py-spy"), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_STACK_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cause_of(error: BaseException) -> BaseException:
    """The error that a remote process raised, out of the one that Ray wrapped it in."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _require_token() -> None:
    """Other users reach the ports of this machine, too: Ray asks who comes where it finds a token, which it reads once."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise ConfigError(f"RAY_AUTH_MODE is {mode!r}: all who reach this machine could run code on it; unset it, or set it to 'token'")
    require_unguessable(os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32)))


def _reach(address: str) -> None:
    """Raise OSError where nobody listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S):
            pass
