"""The Ray Train worker group that runs training jobs: elastic, and restarted from the last commit.

Ray Train replaces lost ranks. A watchdog thread beside it looks for what Ray does not see: ranks
that hang, and machines that came back. A group whose size has to change leaves, and the next one
has as many ranks as there is room for. Ray Train's controller imports this module before any worker
starts, so nothing here imports DeepSpeed or a model early.
"""

import logging
import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from time import monotonic, sleep
from typing import TYPE_CHECKING

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from stillhouse.cluster import _ray_compat
from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.heartbeat import StopRequest
from stillhouse.cluster.nodes import room_at_most, room_for
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import Secrets, end_process, prepare_process, stacks_of
from stillhouse.cluster.session import settle_ray_train
from stillhouse.config import NoticeSource, StudentSection
from stillhouse.errors import HeadGoneError, StillhouseError
from stillhouse.student.watchdog import Stall, has_shrunk, stalled
from stillhouse.tracking import PatientTracker, StallEvent, Tracker
from stillhouse.tracking.log import process_log

if TYPE_CHECKING:
    from stillhouse.student.job import TrainJob

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_GROW_WITHIN_S = 600.0  # for the commit before a group leaves to come back larger
_SETTLE_S, _SETTLE_EVERY_S = 5.0, 0.2  # until resources of the last group are free again


@dataclass(frozen=True, slots=True)
class _WorkerArguments:
    jobs: "Sequence[TrainJob]"
    device: str
    threads: int
    secrets: Secrets
    notices: NoticeSource
    coordinator: Coordinator
    teachers_at_work: bool


def fit(
    jobs: "Sequence[TrainJob]",
    *,
    where: Placement,
    threads: int,
    secrets: Secrets,
    notices: NoticeSource,
    coordinator: Coordinator,
    teachers_at_work: bool,
    journal: Tracker,
) -> None:
    """Train the jobs one after the other on a Ray Train worker group. Blocks until they are done,
    or stopped by request.

    A rank that dies or hangs ends its group, and the next group goes on from the last commit. A
    group that leaves on request comes back with as many ranks as there is room for. An error of
    ours (a diverged loss, a damaged checkpoint) would come again: it ends the training, and is
    raised here.
    """
    # what every rank needs; the controller does not open it
    settle_ray_train()
    arguments = pickle.dumps(
        _WorkerArguments(
            jobs, where.device, threads, secrets, notices, coordinator, teachers_at_work
        )
    )
    # one group after another
    with watched(jobs, where=where, coordinator=coordinator, journal=journal):
        for group in count():
            num_workers = _num_workers(jobs[0].section, where, is_first=group == 0)
            _log.info("%d ranks are started", num_workers)
            with _tried_again_if_too_large(jobs[0].section):
                _trainer(jobs[0], arguments, where=where, num_workers=num_workers).fit()
                verdict = coordinator.fatal_error()
                if verdict is not None:
                    raise verdict
                # else it left to come back, or the coordinator was lost, and what it knew
                if coordinator.finished() or coordinator.exit_reason() == "stop":
                    return


def give_up() -> None:
    """End every `fit` of this process at once: in its own thread it raises an error of Ray's."""
    _ray_compat.kill_train_controllers()


def _trainer(
    job: "TrainJob", arguments: bytes, *, where: Placement, num_workers: int
) -> TorchTrainer:
    timeout_s = int(_peer_timeout(job.section).total_seconds())
    failures = ray.train.FailureConfig(  # type: ignore[call-arg]  # Ray's types are of Train's v1
        max_failures=-1,  # the coordinator counts attempts in a row without a commit
        # a group that finds no room comes back smaller (0), or waits (-1)
        controller_failure_limit=0 if _is_elastic(job.section) else -1,
    )
    return _ray_compat.without_data_sets(TorchTrainer)(
        _worker,
        train_loop_config={"arguments": arguments},
        torch_config=TorchConfig(
            backend="nccl" if where.device == "cuda" else "gloo", timeout_s=timeout_s
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=where.num_gpus > 0, resources_per_worker=where.times(1)
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str((job.run_dir / "ray").resolve()),
            failure_config=failures,
        ),
    )


def _is_elastic(section: StudentSection) -> bool:
    return section.min_workers is not None and section.min_workers < section.num_workers


def _num_workers(section: StudentSection, where: Placement, *, is_first: bool) -> int:
    """How many ranks the next group has: all, or what there is room for once the last group's
    resources are free again; at least `min_workers`.

    The first group waits a moment for machines that are just joining.
    """
    if not _is_elastic(section):
        return section.num_workers
    deadline = monotonic() + _SETTLE_S
    while (room := room_for(where)) < section.num_workers:
        settled = monotonic() > deadline or (room == room_at_most(where) and not is_first)
        if settled and room >= (section.min_workers or 1):
            break
        sleep(_SETTLE_EVERY_S)
    return min(room, section.num_workers)


@contextmanager
def _tried_again_if_too_large(section: StudentSection) -> Iterator[None]:
    """Returns where an elastic group found less room than was counted: a machine is gone, and Ray
    has given up waiting for it."""
    try:
        yield
    except ray.train.ControllerError as error:
        if not _is_elastic(section):
            raise
        _log.info("there was no room for so many ranks: %s", error)


def _peer_timeout(section: StudentSection) -> timedelta:
    """The time-out of a collective, after that of the watchdog, which names the rank."""
    return timedelta(seconds=2 * section.watchdog_s)


@contextmanager
def watched(
    jobs: "Sequence[TrainJob]", *, where: Placement, coordinator: Coordinator, journal: Tracker
) -> Iterator[None]:
    """Runs the watchdog in a thread while the block lasts."""
    stopped = threading.Event()
    arguments = (jobs, where, coordinator, journal, stopped)
    thread = threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _watch(
    jobs: "Sequence[TrainJob]",
    where: Placement,
    coordinator: Coordinator,
    journal: Tracker,
    stopped: threading.Event,
) -> None:
    """Once a second: kill a rank that holds its group up, and ask a group that has shrunk to come
    back larger once there is room.

    Errors of Ray are passed over: that the cluster is gone is found by the caller of `fit`.
    """
    looked_for_room = monotonic()
    while not stopped.wait(_LOOK_EVERY_S):
        for job in jobs:
            with suppress(HeadGoneError, ray.exceptions.RayError):
                section, heard = job.section, coordinator.heard(job.role)
                # a rank that hangs
                stall = stalled(heard, patience_s=section.watchdog_s)
                if stall is not None:
                    _end(stall, job, coordinator, journal)
                    continue
                # a group that could be larger
                has_waited = monotonic() - looked_for_room > section.regroup_s
                if has_waited and has_shrunk(heard, num_workers=section.num_workers):
                    looked_for_room = monotonic()
                    if room_for(where) > 0:
                        detail = "there is room for more ranks"
                        request = StopRequest("grown", _GROW_WITHIN_S, detail)
                        coordinator.request_stop(job.role, request)


def _end(stall: Stall, job: "TrainJob", coordinator: Coordinator, journal: Tracker) -> None:
    """Report which rank stands still and where, and kill it: Ray Train then starts its group again.
    Does not report a rank whose process has ended: Ray Train finds that."""
    last = stall.heartbeat
    stacks = stacks_of(last.pid, node=last.node)
    if stacks is not None:
        # report
        where = f"at {last.phase}" + ("" if last.chunk is None else f" chunk {last.chunk}")
        how = "silent" if stall.silent else where
        why = f"rank {last.rank} was {how} for {stall.seconds:.0f} s in step {last.step}"
        process = f"process {last.pid} on node {last.node}"
        _log.warning("%s of the %s: killing %s, its group is started again", why, job.role, process)
        coordinator.explain(job.role, "stalled", why)
        journal.record(
            StallEvent(
                job.role,
                last.rank,
                last.step,
                last.phase,
                stall.seconds,
                stacks or last.stack,
                last.chunk,
            )
        )
        # kill
        end_process(last.pid, node=last.node)
    coordinator.forget(job.role)


def _patient(coordinator: Coordinator, job: "TrainJob", rank: int) -> PatientTracker:
    """The coordinator as a tracker of events, which waits while the journal's disk is full."""

    def tell(seconds: float, why: str) -> None:
        coordinator.say(f"{job.role}, rank {rank} has waited for {seconds:.0f} s: {why}")

    return PatientTracker(tracker=coordinator, tell=tell)


def _worker(config: dict[str, bytes]) -> None:
    """The process of one rank."""
    arguments: _WorkerArguments = pickle.loads(config["arguments"])
    coordinator = arguments.coordinator
    if coordinator.fatal_error() is not None:
        return
    prepare_process(arguments.device, arguments.threads)
    arguments.secrets.adopt()
    attempt = coordinator.log.attempt if coordinator.log is not None else 0
    rank = ray.train.get_context().get_world_rank()
    with process_log(f"attempt-{attempt}-rank-{rank}", coordinator.log):
        _train(arguments, coordinator)


def _train(arguments: _WorkerArguments, coordinator: Coordinator) -> None:
    import torch
    from torch.distributed import distributed_c10d

    from stillhouse.student.heartbeat import CoordinatorLink
    from stillhouse.student.train import train

    is_cuda = arguments.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    for job in arguments.jobs:
        # also for the groups that ZeRO makes, which would wait for ever
        distributed_c10d.default_pg_timeout = _peer_timeout(job.section)
        try:
            with CoordinatorLink(
                coordinator,
                job,
                arguments.notices,
                rank=rank,
                world_size=world_size,
                teachers_at_work=arguments.teachers_at_work,
            ) as link:
                journal = _patient(coordinator, job, rank)
                finished = train(job, device=device, journal=journal, link=link)
        # no coordinator to report to: the cluster is gone, or this machine is cut off from it
        except HeadGoneError:
            raise
        # it would come again: the training ends
        except StillhouseError as error:
            coordinator.give_up(error)
            raise
        # the group is started again
        except Exception as error:
            coordinator.explain(job.role, "died", f"{type(error).__name__}: {error}")
            raise
        if not finished:
            return
        _log.info("the %s has taken and committed all its %d steps", job.role, job.total_steps)
    coordinator.finish()
