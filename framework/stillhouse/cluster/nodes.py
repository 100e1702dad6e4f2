"""The nodes of a Ray cluster: their resources, the files that they see, and which of them will be
taken away."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from stillhouse.cluster import _ray_compat
from stillhouse.cluster.placement import (
    Placement,
    ResourceNeeds,
    how_many_fit,
    placement,
    require_room,
    shortages,
)
from stillhouse.cluster.preemption import (
    Endpoints,
    PreemptionNotice,
    PreemptionWatch,
    local_sources,
)
from stillhouse.cluster.processes import ask_node
from stillhouse.config import ClusterSection, NoticeSource

_LOOK_EVERY_S = 1.0
_DRAIN_S = 120.0  # for a node that is drained without a deadline
_ANSWER_S = 30.0


def metadata_endpoints() -> Endpoints:
    """The addresses of the clouds' metadata servers: the usual ones, or those of the variables that
    the clouds' own tools read."""
    usual = Endpoints()
    gcp_host = os.environ.get("GCE_METADATA_HOST")
    return Endpoints(
        aws=os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or usual.aws,
        gcp=f"http://{gcp_host}" if gcp_host else usual.gcp,
        azure=usual.azure,
    )


def machine_notices(
    kind: NoticeSource, *, on_notice: Callable[[PreemptionNotice], None] | None = None
) -> PreemptionWatch:
    """A watch for preemption notices of this machine, to be entered in a process that runs on it.
    `kind` is `cluster.notices` of the config."""
    return PreemptionWatch(local_sources(kind, metadata_endpoints()), on_notice=on_notice)


def await_room(
    needs: ResourceNeeds, section: ClusterSection, *, waiting: Callable[[str], None]
) -> dict[str, float]:
    """Wait until the cluster's resources cover the needs; returns them. Machines of a cluster that
    this run attaches to may still be joining.

    A cluster with an autoscaler is requested to grow. `waiting` is called once a second with what
    is missing, and may raise. Raises ConfigError where it is still missing after `section.join_s`.
    """
    available: dict[str, float] = ray.cluster_resources()
    if section.address is not None and shortages(needs, available):
        deadline = monotonic() + section.join_s
        with _requested(needs, available):
            while (missing := shortages(needs, available)) and monotonic() < deadline:
                waiting("; ".join(missing))
                sleep(_LOOK_EVERY_S)
                available = ray.cluster_resources()
    require_room(needs, available)
    return available


@contextmanager
def _requested(needs: ResourceNeeds, available: Mapping[str, float]) -> Iterator[None]:
    """A placement group of all the needs, for as long as the block and this process last: what
    Ray's autoscaler, where there is one, makes room for."""
    bundles = [
        placement(section, available).times(1)
        for section, count in needs.values()
        for _ in range(count)
    ]
    group = placement_group(bundles)
    try:
        yield
    finally:
        remove_placement_group(group)


def this_node() -> str:
    """Ray's id of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id()


def draining() -> dict[str, PreemptionNotice]:
    """The nodes that Ray drains, by id, with the deadline that was set for each."""
    deadlines = {
        node: ms / 1e3 if ms else time() + _DRAIN_S
        for node, ms in _ray_compat.drain_deadlines_ms().items()
    }
    return {
        node: PreemptionNotice("ray", deadline, "the node is being drained")
        for node, deadline in deadlines.items()
    }


def drain(node: str, notice: PreemptionNotice) -> None:
    """Make Ray start nothing more on a node whose machine will be taken away."""
    detail, deadline_ms = f"{notice.source}: {notice.detail}", int(notice.deadline * 1e3)
    _ray_compat.drain_node(node, detail=detail, deadline_ms=deadline_ms)


def room_for(where: Placement) -> int:
    """How many such processes fit into what is free, on nodes that are not drained."""
    return _room_in(_ray_compat.free_resources(), where)


def room_at_most(where: Placement) -> int:
    """How many would fit there if nothing else ran."""
    return _room_in(_ray_compat.total_resources(), where)


def _room_in(resources_by_node: Mapping[str, Mapping[str, float]], where: Placement) -> int:
    leaving = draining()
    staying = [there for node, there in resources_by_node.items() if node not in leaving]
    return sum(how_many_fit(there, where) for there in staying)


def nodes_with_room(placements: Collection[Placement]) -> list[dict[str, Any]]:
    """The live nodes, as Ray describes them, that have the resources for one of the placements."""
    resources = _ray_compat.total_resources()

    def fits(node: Mapping[str, Any]) -> bool:
        there = resources.get(node["NodeID"], {})
        return node["Alive"] and any(how_many_fit(there, where) for where in placements)

    return [node for node in ray.nodes() if fits(node)]


def machines_without(path: Path, placements: Collection[Placement]) -> list[str]:
    """The addresses of the other machines on which there is no such file, or that do not answer. Of
    those alone that have the resources for one of the placements."""
    # every machine that may run one of the processes is asked at once
    here = this_node()
    addresses = {  # by the reference to the answer
        ask_node(node["NodeID"], os.path.exists, path): node["NodeManagerAddress"]
        for node in nodes_with_room(placements)
        if node["NodeID"] != here
    }
    if not addresses:
        return []
    # those without an answer in time, or with a bad one
    answers = [*addresses]
    answered, silent = ray.wait(answers, num_returns=len(answers), timeout=_ANSWER_S)
    blind = [*silent, *(answer for answer in answered if not _sees(answer))]
    return sorted(addresses[answer] for answer in blind)


def _sees(answer: Any) -> bool:
    try:
        return bool(ray.get(answer))
    except ray.exceptions.RayTaskError:
        return False
    except ray.exceptions.RayError:  # the machine has just gone
        return True
