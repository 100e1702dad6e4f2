"""The Ray cluster: attach to one or start one, know what it has, and hand processes what they need to run on it.

What travels between processes here is small: cursors, chunk numbers, secrets. No tensor does.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import time
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stillhouse.config import ClusterSection, ModelSection, StudentSection, TeacherSection
from stillhouse.errors import ConfigError, RunError, StillhouseError
from stillhouse.notices import Notice

Phase = Literal["start", "data", "step", "snapshot"]

_NAMESPACE = "stillhouse"
_OBJECT_STORE_BYTES = 256 << 20  # work items and answers only: the default would take 30 % of the machine's memory
_REACH_S = 10.0
_DRAIN_S = 120.0  # for a node that is drained without a deadline


@dataclass(frozen=True, slots=True)
class Placement:
    """What one process asks of Ray, and the device that its tensors will live on."""

    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float]

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus > 0 else "cpu"

    def times(self, count: int) -> dict[str, float]:
        """The total of `count` such processes, by resource name."""
        return {name: count * amount for name, amount in {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}.items() if amount}


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a process needs to reach gated models; its repr shows nothing, and it travels as an argument, never in a config."""

    hub_token: str | None = field(repr=False)

    def adopt(self) -> None:
        """Make the secrets this process's own, where Hugging Face looks for them."""
        if self.hub_token is not None:
            os.environ["HF_TOKEN"] = self.hub_token


def local_secrets() -> Secrets:
    """The hub token of the person who starts the run: HF_TOKEN, or what `hf auth login` stored."""
    from huggingface_hub import get_token

    return Secrets(hub_token=get_token())


def prepare_process(device: str, threads: int) -> None:
    """Settle a worker process before its first tensor: torch threads, DeepSpeed's accelerator, and no pickle in any checkpoint."""
    import torch

    torch.set_num_threads(threads)
    os.environ["DS_ACCELERATOR"] = device
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def attached(section: ClusterSection) -> Iterator[dict[str, float]]:
    """Attach to the cluster that the section names, or start one on this machine; yields its resources by name.

    A cluster that this started ends with the block. Inside an already attached process (a test session) it is used as it is.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    _connect(section)
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def placement(section: ModelSection, available: Mapping[str, float]) -> Placement:
    """Where a process of this section goes: a GPU where `device` says so or the cluster has one, else the CPU."""
    on_gpu = section.device == "cuda" or (section.device == "auto" and available.get("GPU", 0.0) > 0)
    default_gpus = 1.0 if on_gpu else 0.0
    num_gpus = default_gpus if section.num_gpus is None else section.num_gpus
    if section.device == "cpu" and num_gpus > 0:
        raise ConfigError(f"device is 'cpu' but num_gpus is {num_gpus:g}; set num_gpus to 0 or leave it out, or set device = \"cuda\"")
    if section.device == "cuda" and num_gpus == 0:
        raise ConfigError("device is 'cuda' but num_gpus is 0; ask for at least a fraction of a GPU, or set device = \"cpu\"")
    return Placement(section.num_cpus, num_gpus, dict(section.resources))


def shortages(crews: Mapping[str, tuple[ModelSection, int]], available: Mapping[str, float]) -> list[str]:
    """What would be waited for in vain: each resource of which the crews, by name, together need more than the cluster has."""
    needed: dict[str, float] = {}
    for section, count in crews.values():
        for name, amount in placement(section, available).times(count).items():
            needed[name] = needed.get(name, 0.0) + amount
    of_whom = " and ".join(f"{count} {crew}" for crew, (_, count) in crews.items())
    return [
        f"{name}: {amount:g} needed ({of_whom}), {available.get(name, 0.0):g} in the cluster"
        for name, amount in needed.items()
        if amount > available.get(name, 0.0) + 1e-9
    ]


def require_room(crews: Mapping[str, tuple[ModelSection, int]], available: Mapping[str, float]) -> None:
    """Raise ConfigError where `shortages` finds any: Ray itself would wait for ever without a word."""
    missing = shortages(crews, available)
    if missing:
        raise ConfigError(
            "the cluster is too small for this run:\n"
            + "\n".join(f"  - {line}" for line in missing)
            + "\nLower min_replicas, num_workers, num_cpus or num_gpus (fractions share a core), or attach to a larger cluster."
        )


def teacher_crew(section: TeacherSection) -> dict[str, tuple[ModelSection, int]]:
    """The fewest teachers with which a run begins, as a crew."""
    return {"teachers": (section, section.min_replicas)}


def student_crew(section: StudentSection) -> dict[str, tuple[ModelSection, int]]:
    """All ranks of the student, as a crew."""
    return {"student ranks": (section, section.num_workers)}


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank's last sign of life."""

    step: int  # that it is in, counted from 1
    phase: Phase
    time: float  # unix seconds, by the board's clock


@dataclass(frozen=True, slots=True)
class News:
    """What has come in on a board."""

    cursors: Mapping[str, int]  # reader -> chunks at the front of the reading order that it will never need again
    bad_chunks: frozenset[int]  # reported since the last look
    notices: Mapping[str, Notice]  # node id -> the end that it announced


class _Board:
    """Small answers on their way back: cursors, bad chunks, notices and signs of life."""

    def __init__(self) -> None:
        self._cursors: dict[str, int] = {}
        self._bad_chunks: set[int] = set()
        self._notices: dict[str, Notice] = {}
        self._beats: dict[str, dict[int, Beat]] = {}

    def move_cursor(self, reader: str, num_chunks: int) -> None:
        self._cursors[reader] = num_chunks

    def report_bad_chunk(self, number: int) -> None:
        self._bad_chunks.add(number)

    def announce(self, node: str, notice: Notice) -> None:
        self._notices.setdefault(node, notice)

    def beat(self, group: str, rank: int, step: int, phase: Phase) -> None:
        self._beats.setdefault(group, {})[rank] = Beat(step, phase, time())

    def beats(self, group: str) -> tuple[dict[int, Beat], float]:
        return dict(self._beats.get(group, {})), time()

    def notices(self) -> dict[str, Notice]:
        return dict(self._notices)

    def read(self) -> News:
        bad_chunks, self._bad_chunks = self._bad_chunks, set()
        return News(dict(self._cursors), frozenset(bad_chunks), dict(self._notices))


@dataclass(frozen=True, slots=True)
class Board:
    """A handle to the one small actor through which students answer the pool; it can be passed to any process.

    It lives on the node of the process that made it, and not on one that may be taken away from a run that goes on.
    """

    _actor: Any

    @classmethod
    def create(cls) -> "Board":
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        return cls(ray.remote(_Board).options(**options).remote())

    def move_cursor(self, reader: str, num_chunks: int) -> None:
        """`reader` will never again need the first `num_chunks` chunks of the reading order. Returns at once."""
        self._actor.move_cursor.remote(reader, num_chunks)

    def report_bad_chunk(self, number: int) -> None:
        """A reader found chunk `number` damaged. Returns at once."""
        self._actor.report_bad_chunk.remote(number)

    def announce(self, node: str, notice: Notice) -> None:
        """The machine of Ray's node `node` will be taken away. Returns at once."""
        self._actor.announce.remote(node, notice)

    def beat(self, group: str, rank: int, *, step: int, phase: Phase) -> None:
        """Rank `rank` of a group lives, and is in `phase` of `step`. Returns at once."""
        self._actor.beat.remote(group, rank, step, phase)

    def beats(self, group: str) -> tuple[dict[int, Beat], float]:
        """The last beat of each rank of a group, and the time by the same clock."""
        return ray.get(self._actor.beats.remote(group))

    def notices(self) -> dict[str, Notice]:
        """Every notice so far, by node id."""
        return ray.get(self._actor.notices.remote())

    def read(self) -> News:
        """For the teacher pool, which alone reads: what has come in."""
        return ray.get(self._actor.read.remote())


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


def draining() -> dict[str, Notice]:
    """The nodes that Ray will take away, by id, with the end that was set for each."""
    found = ray._private.state.state.get_draining_nodes()
    return {node: Notice("ray", ms / 1e3 if ms else time() + _DRAIN_S, "the node is being drained") for node, ms in found.items()}


def cause_of(error: BaseException) -> BaseException:
    """The error that a remote process raised, out of the one that Ray wrapped it in."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _connect(section: ClusterSection) -> None:
    options: dict[str, Any] = {"address": section.address}
    if section.address is None:
        options = {
            "address": "local",
            "num_cpus": section.num_cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        if section.address is not None:
            _reach(section.address)
        ray.init(**options, namespace=_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {section.address!r} ({error}); start one with `ray start --head`, or leave cluster.address out"
        ) from None


def _reach(address: str) -> None:
    """Raise OSError where nobody listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S):
            pass
