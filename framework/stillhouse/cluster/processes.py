"""Processes of a run on a Ray cluster: the secrets and settings of a new one, remote calls, stack
dumps, kills."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stillhouse.cluster.environment import forbid_pickled_code, learn_secrets, secret_in
from stillhouse.cluster.placement import Placement
from stillhouse.errors import RunError, StillhouseError
from stillhouse.redaction import know

_END_S, _STACK_S = 30.0, 10.0


@dataclass(frozen=True, slots=True)
class Secrets:
    """The credentials of a process, for gated models and for a teacher's server. They are not in
    the repr, and travel as an argument, never in a config."""

    hub_token: str | None = field(repr=False)
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)  # by variable

    def adopt(self) -> None:
        """Set the secrets in this process's environment, where libraries look for them."""
        found = (
            {**self.keys} if self.hub_token is None else {**self.keys, "HF_TOKEN": self.hub_token}
        )
        os.environ.update(found)
        know(found.values())


def local_secrets(*variables: str) -> Secrets:
    """Those of the user who starts the run: the hub token, in HF_TOKEN or where `hf auth login`
    stored it, and what these variables hold."""
    from huggingface_hub import get_token

    keys = {name: key for name in variables if (key := secret_in(name)) is not None}
    return Secrets(hub_token=get_token(), keys=keys)


def prepare_process(device: str, threads: int) -> None:
    """Set up a worker process before its first tensor: torch threads, DeepSpeed's accelerator, and
    no pickled code in any checkpoint."""
    import torch

    learn_secrets()
    torch.set_num_threads(threads)
    os.environ["DS_ACCELERATOR"] = device
    forbid_pickled_code()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def call_remotely(function: Callable[..., Any], *arguments: object, where: Placement) -> Any:
    """Run a function in a new process on the cluster, wait for it, and return its (small) answer.

    Raises the error that the function raises, and RunError where its process died twice.
    """
    remote = ray.remote(function).options(
        num_cpus=where.num_cpus,
        num_gpus=where.num_gpus,
        resources=dict(where.resources) or None,
        max_retries=1,
    )
    try:
        return ray.get(remote.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        cause = cause_of(error)
        raise cause from None if isinstance(cause, StillhouseError) else error
    except ray.exceptions.RayError as error:
        raise RunError(
            f"the process of `{function.__name__}` was lost ({error}); if its memory ran out, "
            "give it a larger machine, or smaller batches"
        ) from error


def stacks_of(pid: int, *, node: str) -> str | None:
    """The stacks of a worker's threads: empty where they cannot be read, None where the worker is
    gone."""
    stacks: str | None = _answer(ask_node(node, _stack_of, pid))
    return stacks


def end_process(pid: int, *, node: str) -> None:
    """Kill a worker on a node, if it is still there."""
    _answer(ask_node(node, _end_process, pid))


def ask_node(node: str, function: Callable[..., Any], *arguments: object) -> Any:
    """Start a function on this node. Returns Ray's reference to its answer."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=there).remote(*arguments)


def _answer(asked: Any) -> Any:
    try:
        return ray.get(asked, timeout=_END_S)
    except ray.exceptions.RayError:  # the node is gone, or hangs: Ray's health check ends it
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
    """By py-spy, which comes with Ray and can read a stopped process; it needs the right to trace
    others."""
    if _worker_process(pid) is None:
        return None
    py_spy = str(Path(sys.executable).parent / "py-spy")
    command = [py_spy, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_STACK_S, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cause_of(error: BaseException) -> BaseException:
    """The error that a remote process raised, unwrapped from Ray's own."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
