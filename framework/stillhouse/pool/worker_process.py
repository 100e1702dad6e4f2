"""`WorkerProcess`: what the process of every worker has beside its work: heartbeats, a log, and a
watch for preemption notices."""

from typing import Protocol

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.nodes import machine_notices, this_node
from stillhouse.cluster.processes import Secrets, prepare_process
from stillhouse.config import NoticeSource
from stillhouse.errors import StoreError
from stillhouse.pool.heartbeats import BEATS_PER_WATCH, begin_heartbeat
from stillhouse.pool.stock import BlockStore
from stillhouse.tracking import OutageEvent
from stillhouse.tracking.log import process_log


class Watched(Protocol):
    """A section of the config, of workers."""

    @property
    def watchdog_s(self) -> float: ...


class Job(Protocol):
    """What a worker was started for, as far as its process is concerned."""

    @property
    def section(self) -> Watched: ...

    @property
    def threads(self) -> int:
        """Of torch, on the CPU."""
        ...

    @property
    def notices(self) -> NoticeSource:
        """Of the preemption of its machine."""
        ...


class WorkerProcess:
    """This process as a worker, until it ends."""

    def __init__(
        self,
        role: str,
        number: int,
        job: Job,
        *,
        device: str,
        secrets: Secrets,
        coordinator: Coordinator,
    ):
        self.node = this_node()  # Ray's id of the machine's node
        self._role, self._coordinator = role, coordinator
        begin_heartbeat(
            lambda: coordinator.heartbeat_of_worker(number),
            every_s=job.section.watchdog_s / BEATS_PER_WATCH,
        )
        prepare_process(device, job.threads)
        secrets.adopt()
        self._log = process_log(f"{role}-{number}", coordinator.log)
        self._log.__enter__()
        self._watch = machine_notices(
            job.notices, on_notice=lambda notice: coordinator.announce(self.node, notice)
        )
        self._watch.__enter__()

    def tell_of_outage(self, seconds: float, why: str) -> None:
        """Report for how long the worker has waited for the store."""
        self._coordinator.mention(OutageEvent(f"{self._role} on {self.node[:8]}", seconds, why))


def is_there(store: BlockStore, number: int) -> bool:
    """Whether the block is known to be published; False while the store does not answer.

    Publishing tries such a store again.
    """
    try:
        return store.is_whole(number)
    except StoreError:
        return False
