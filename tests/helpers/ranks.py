"""Long-lived rank processes: gloo groups of one and of two, in which tests build and drop as many
engines as they like."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray


class _Rank:
    def join(self, rank: int, world_size: int, meeting: Path) -> None:
        import torch.distributed as dist

        from stillhouse.cluster.processes import prepare_process

        prepare_process("cpu", 1)
        import helpers.training  # noqa: F401  # takes seconds, and is what tests call here

        # as Ray Train does
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
        }
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )

    def call(self, function: Callable[..., Any], arguments: Sequence[object]) -> Any:
        return function(*arguments)


@dataclass(frozen=True)
class RankGroup:
    """Processes that share one process group."""

    actors: Sequence[Any]
    joined: Sequence[Any]  # answers to come

    @classmethod
    def start(cls, world_size: int, *, meeting: Path) -> "RankGroup":
        """Returns at once: the processes find one another by a file, which must not be there yet,
        while the test does other things."""
        actors: list[Any] = [
            ray.remote(_Rank).options(num_cpus=0).remote() for _ in range(world_size)
        ]
        return cls(
            actors,
            [actor.join.remote(rank, world_size, meeting) for rank, actor in enumerate(actors)],
        )

    def call(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """The function's answer on each rank. Raises what a rank raised."""
        ray.get([*self.joined])
        return ray.get([actor.call.remote(function, arguments) for actor in self.actors])
