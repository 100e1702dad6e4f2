"""The Ray Train worker group that runs training jobs, and what happens when a rank is lost.

Ray Train's controller imports this module before any worker starts, so nothing here imports DeepSpeed or a model before it is needed.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from stillhouse.cluster import Board, Placement, Secrets, cause_of, prepare_process
from stillhouse.errors import StillhouseError, StudentError

if TYPE_CHECKING:
    from stillhouse.student.job import TrainJob

_PEER_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class _WorkerArguments:
    jobs: "Sequence[TrainJob]"
    device: str
    threads: int
    secrets: Secrets
    board: Board | None


def fit(
    jobs: "Sequence[TrainJob]",
    *,
    where: Placement,
    num_workers: int,
    threads: int,
    secrets: Secrets,
    board: Board | None,
    max_failures: int,
) -> None:
    """Train the jobs one after the other on a Ray Train worker group; blocks until they are done.

    A rank that dies takes the group with it, and the group starts again from the last commit, `max_failures` times. An error of
    ours (a diverged loss, a damaged checkpoint) would only come again: it is raised at once.
    """
    arguments = pickle.dumps(_WorkerArguments(jobs, where.device, threads, secrets, board))  # the controller need not open it
    for attempt in range(max_failures + 1):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"arguments": arguments},
            torch_config=TorchConfig(backend="nccl" if where.device == "cuda" else "gloo", timeout_s=int(_PEER_TIMEOUT.total_seconds())),
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=where.num_gpus > 0,
                resources_per_worker=where.times(1),
            ),
            run_config=ray.train.RunConfig(name="train", storage_path=str((jobs[0].run_dir / "ray").resolve())),
        )
        try:
            trainer.fit()
            return
        except ray.train.WorkerGroupError as error:
            failures = [cause_of(failure) for failure in error.worker_failures.values()]
            ours = next((failure for failure in failures if isinstance(failure, StillhouseError)), None)
            if ours is not None:
                raise ours from None
            if attempt == max_failures:
                raise StudentError(f"the student's ranks failed {attempt + 1} times, last with: {failures[0]!r}") from error


def _worker(config: dict[str, bytes]) -> None:
    arguments: _WorkerArguments = pickle.loads(config["arguments"])
    prepare_process(arguments.device, arguments.threads)
    arguments.secrets.adopt()

    import torch
    from torch.distributed import distributed_c10d

    from stillhouse.student.train import train
    from stillhouse.tracking import Journal

    distributed_c10d.default_pg_timeout = _PEER_TIMEOUT  # ZeRO makes groups of its own, which would wait for ever
    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else torch.device("cpu")
    for job in arguments.jobs:
        train(job, device=device, journal=Journal(job.journal), board=arguments.board)
