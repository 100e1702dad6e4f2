"""The Ray Train worker group that runs training jobs: it is started again from the last commit,
with as many ranks as there is room for.

Ray Train replaces lost ranks. A thread beside it looks after what Ray does not see: ranks that
hang, and machines that came back. A group whose size has to change leaves, and the next one is made
by the room that there is. Ray Train's controller imports this module before any worker starts, so
nothing here imports DeepSpeed or a model early.
"""

import logging
import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep
from typing import TYPE_CHECKING

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from stillhouse.cluster import _ray_compat
from stillhouse.cluster.coordinator import Coordinator, StopRequest
from stillhouse.cluster.nodes import room_at_most, room_for
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import Secrets, end_process, prepare_process, stacks_of
from stillhouse.cluster.session import settle_ray_train
from stillhouse.config import NoticeSource, StudentSection
from stillhouse.errors import HeadGoneError, StillhouseError
from stillhouse.student.watchdog import Stall, has_shrunk, stalled
from stillhouse.tracking import PatientTracker, StallRow, Tracker
from stillhouse.tracking.log import process_log

if TYPE_CHECKING:
    from stillhouse.student.job import TrainJob

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_GROW_WITHIN_S = 600.0  # for the commit before a group is made larger
_SETTLE_S, _SETTLE_EVERY_S = 5.0, 0.2  # for what the last group held to be free again


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
    """Train the jobs one after the other on a Ray Train worker group; blocks until they are done,
    or were told to stop.

    A rank that dies or hangs takes the group with it, and the group goes on from the last commit. A
    group that was asked to leave comes back with as many ranks as there is room for. An error of
    ours (a diverged loss, a damaged checkpoint) would only come again: it ends the training and is
    raised here.
    """
    settle_ray_train()
    arguments = pickle.dumps(  # the controller need not open it
        _WorkerArguments(
            jobs, where.device, threads, secrets, notices, coordinator, teachers_at_work
        )
    )
    with watched(jobs, where=where, coordinator=coordinator, journal=journal):
        is_first = True
        while True:
            num_workers = _num_workers(jobs[0].section, where, is_first=is_first)
            is_first = False
            _log.info("%d ranks are started", num_workers)
            with _tried_again_if_too_large(jobs[0].section):
                _trainer(jobs[0], arguments, where=where, num_workers=num_workers).fit()
                verdict = coordinator.verdict()
                if verdict is not None:
                    raise verdict
                if (
                    coordinator.finished() or coordinator.departure() == "stop"
                ):  # else it left to come back, or the coordinator lost what it was told
                    return


def give_up() -> None:
    """End every `fit` of this process at once: in its own thread it raises an error of Ray's."""
    _ray_compat.kill_train_controllers()


def _trainer(
    job: "TrainJob", arguments: bytes, *, where: Placement, num_workers: int
) -> TorchTrainer:
    timeout_s = int(_peer_timeout(job.section).total_seconds())
    return TorchTrainer(
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
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]  # Ray's types are those of Train's first version
                max_failures=-1,  # the coordinator counts: lives in a row without a commit
                controller_failure_limit=0
                if _is_elastic(job.section)
                else -1,  # a group that finds no room comes back smaller, or waits
            ),
        ),
    )


def _is_elastic(section: StudentSection) -> bool:
    return section.min_workers is not None and section.min_workers < section.num_workers


def _num_workers(section: StudentSection, where: Placement, *, is_first: bool) -> int:
    """How many ranks the next group has: all, or what there is room for once the last group's is
    free again; at least `min_workers`.

    The first group gives machines that are just joining a moment.
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
    """A machine that was counted on is gone: Ray gave up to wait for it. Count again."""
    try:
        yield
    except ray.train.ControllerError as error:
        if not _is_elastic(section):
            raise
        _log.info("there was no room for so many ranks: %s", error)


def _peer_timeout(section: StudentSection) -> timedelta:
    """After which a collective gives up by itself: the watchdog, which names the rank, comes
    first."""
    return timedelta(seconds=2 * section.watchdog_s)


@contextmanager
def watched(
    jobs: "Sequence[TrainJob]", *, where: Placement, coordinator: Coordinator, journal: Tracker
) -> Iterator[None]:
    stopped = threading.Event()
    thread = threading.Thread(
        target=_watch,
        args=(jobs, where, coordinator, journal, stopped),
        name="watchdog",
        daemon=True,
    )
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
    """Once a second: end a rank that holds its group up, and ask a group that has shrunk to come
    back larger once there is room.

    That the cluster is gone is told by whoever waits for the students: this ends with them.
    """
    looked_for_room = monotonic()
    while not stopped.wait(_LOOK_EVERY_S):
        for job in jobs:
            try:
                section, heard = job.section, coordinator.heard(job.role)
                stall = stalled(heard, patience_s=section.watchdog_s)
                if stall is not None:
                    _end(stall, job, coordinator, journal)
                elif (
                    has_shrunk(heard, num_workers=section.num_workers)
                    and monotonic() - looked_for_room > section.regroup_s
                ):
                    looked_for_room = monotonic()
                    if room_for(where) > 0:
                        coordinator.request_stop(
                            job.role,
                            StopRequest("grown", _GROW_WITHIN_S, "there is room for more ranks"),
                        )
            except (HeadGoneError, ray.exceptions.RayError):
                continue


def _end(stall: Stall, job: "TrainJob", coordinator: Coordinator, journal: Tracker) -> None:
    """Say which rank stands still and where, and kill it: Ray Train then starts its group again.
    One that died is Ray Train's to find."""
    heartbeat = stall.heartbeat
    stacks = stacks_of(heartbeat.pid, node=heartbeat.node)
    if stacks is not None:
        how = (
            "silent"
            if stall.silent
            else "at "
            f"{heartbeat.phase}{'' if heartbeat.chunk is None else f' chunk {heartbeat.chunk}'}"
        )
        why = f"rank {heartbeat.rank} was {how} for {stall.seconds:.0f} s in step {heartbeat.step}"
        _log.warning(
            "%s of the %s, process %d on node %s: it is killed, and its group started again",
            why,
            job.role,
            heartbeat.pid,
            heartbeat.node,
        )
        coordinator.explain(job.role, "stalled", why)
        journal.record(
            StallRow(
                job.role,
                heartbeat.rank,
                heartbeat.step,
                heartbeat.phase,
                stall.seconds,
                stacks or heartbeat.stack,
                heartbeat.chunk,
            )
        )
        end_process(heartbeat.pid, node=heartbeat.node)
    coordinator.forget(job.role)


def _patient(coordinator: Coordinator, job: "TrainJob", rank: int) -> PatientTracker:
    """The coordinator as a tracker that waits while the journal's disk is full."""

    def tell(seconds: float, why: str) -> None:
        coordinator.say(f"{job.role}, rank {rank} has waited for {seconds:.0f} s: {why}")

    return PatientTracker(tracker=coordinator, tell=tell)


def _worker(config: dict[str, bytes]) -> None:
    arguments: _WorkerArguments = pickle.loads(config["arguments"])
    coordinator = arguments.coordinator
    if coordinator.verdict() is not None:
        return
    prepare_process(arguments.device, arguments.threads)
    arguments.secrets.adopt()
    attempt = coordinator.log.attempt if coordinator.log is not None else 0
    with process_log(
        f"attempt-{attempt}-rank-{ray.train.get_context().get_world_rank()}", coordinator.log
    ):
        _train(arguments, coordinator)


def _train(arguments: _WorkerArguments, coordinator: Coordinator) -> None:
    import torch
    from torch.distributed import distributed_c10d

    from stillhouse.student.heartbeat import CoordinatorLink
    from stillhouse.student.train import train

    device = (
        torch.device("cuda", torch.cuda.current_device())
        if arguments.device == "cuda"
        else torch.device("cpu")
    )
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    for job in arguments.jobs:
        # ZeRO makes groups of its own, which would wait for ever
        distributed_c10d.default_pg_timeout = _peer_timeout(job.section)
        try:
            line = CoordinatorLink(
                coordinator,
                job,
                arguments.notices,
                rank=rank,
                world_size=world_size,
                teachers_at_work=arguments.teachers_at_work,
            )
            with line as link:
                finished = train(
                    job, device=device, journal=_patient(coordinator, job, rank), link=link
                )
        except HeadGoneError:
            # nobody is there to be told; or this machine is cut off, and the group goes on without
            # it
            raise
        except StillhouseError as error:
            coordinator.give_up(error)
            raise
        except Exception as error:
            coordinator.explain(job.role, "died", f"{type(error).__name__}: {error}")
            raise
        if not finished:
            return
    coordinator.finish()
