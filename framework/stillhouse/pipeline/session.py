"""A session: one command at work on a cluster, from when there is room for its processes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.nodes import await_room
from stillhouse.cluster.placement import Placement, ResourceNeeds, placement
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection, ModelSection
from stillhouse.pipeline.console import patient
from stillhouse.pipeline.machines import Machines, watched_machines
from stillhouse.tracking import Journal, PhaseEvent, Tracker, WaitEvent


@dataclass(frozen=True, slots=True)
class Session:
    """What all processes of one command share."""

    cluster: ClusterSection
    available: Mapping[str, float]  # the cluster's resources, by name
    coordinator: Coordinator
    journal: Tracker

    def place_of(self, section: ModelSection) -> Placement:
        """What a process of this section asks of Ray."""
        return placement(section, self.available)


@contextmanager
def on_ray(cluster: ClusterSection, journal: Journal) -> Iterator[dict[str, float]]:
    """This process on the cluster, for as long as the block lasts; its resources by name."""
    phase = "starting Ray" if cluster.address is None else f"joining {cluster.address}"
    patient(journal).record(PhaseEvent("run", phase))
    with attached(cluster) as available:
        yield available


@contextmanager
def at_work(
    cluster: ClusterSection, journal: Journal, needs: ResourceNeeds
) -> Iterator[tuple[Session, Machines]]:
    """Wait for room on the cluster that this process is attached to, and listen to its machines for
    as long as the block lasts.

    The session's journal waits while its disk is full, but no longer than the time that a SIGTERM
    leaves the driver.
    """
    coordinator = Coordinator.create(journal.path)
    with watched_machines(coordinator, journal, grace_s=cluster.grace_s) as machines:
        events = patient(journal, pause=machines.pause)
        available = enough_room(needs, cluster, events, unless=machines.require_driver)
        yield Session(cluster, available, coordinator, events), machines


def enough_room(
    needs: ResourceNeeds, cluster: ClusterSection, journal: Tracker, *, unless: Callable[[], None]
) -> dict[str, float]:
    """The cluster's resources by name, once they suffice; the wait is journalled. `unless` raises
    to end the wait."""
    last = ""

    def waiting(missing: str) -> None:
        nonlocal last
        unless()
        if missing != last:
            journal.record(WaitEvent(missing))
            last = missing

    available = await_room(needs, cluster, waiting=waiting)
    if last:
        journal.record(WaitEvent(""))
    return available
