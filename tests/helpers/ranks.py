"""Long-lived rank processes: gloo groups of one and of two, in which tests build and drop as many engines as they like."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray


class _Rank:
    def join(self, rank: int, world_size: int, port: int) -> None:
        import torch.distributed as dist

        from stillhouse.cluster import prepare_process

        prepare_process("cpu", 1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}  # as Ray Train does
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )

    def call(self, function: Callable[..., Any], arguments: Sequence[object]) -> Any:
        return function(*arguments)


@dataclass(frozen=True)
class RankGroup:
    """Processes that share one process group."""

    actors: Sequence[Any]

    @classmethod
    def start(cls, world_size: int) -> "RankGroup":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        actors = [ray.remote(_Rank).options(num_cpus=0).remote() for _ in range(world_size)]
        ray.get([actor.join.remote(rank, world_size, port) for rank, actor in enumerate(actors)])
        return cls(actors)

    def call(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """The function's answer on each rank. Raises what a rank raised."""
        return ray.get([actor.call.remote(function, arguments) for actor in self.actors])
