"""The nodes of a cluster: which there are, how much room they have, and which will be taken
away."""

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
    """Where this machine's cloud answers: at its usual address, or where the variables say that the
    cloud's own tools go by."""
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
    """A watch over this machine's own end, to be entered in a process that runs on it. `kind` is
    `cluster.notices` of the config."""
    return PreemptionWatch(local_sources(kind, metadata_endpoints()), on_notice=on_notice)


def await_room(
    crews: ResourceNeeds, section: ClusterSection, *, waiting: Callable[[str], None]
) -> dict[str, float]:
    """The cluster's resources, once they suffice for these crews: machines of a cluster that was
    there before may still be on their way.

    A cluster that can grow is asked to. `waiting` hears what is missing once a second, and may
    raise. Raises ConfigError where it is still missing after `section.join_s`.
    """
    available: dict[str, float] = ray.cluster_resources()
    if section.address is not None and shortages(crews, available):
        deadline = monotonic() + section.join_s
        with _wanted(crews, available):
            while (
                missing := shortages(crews, available := ray.cluster_resources())
            ) and monotonic() < deadline:
                waiting("; ".join(missing))
                sleep(_LOOK_EVERY_S)
    require_room(crews, available)
    return available


@contextmanager
def _wanted(crews: ResourceNeeds, available: Mapping[str, float]) -> Iterator[None]:
    """For as long as the block and this process last, Ray's autoscaler, where there is one, sees
    that all of them want room."""
    wanted = placement_group(
        [
            placement(section, available).times(1)
            for section, count in crews.values()
            for _ in range(count)
        ]
    )
    try:
        yield
    finally:
        remove_placement_group(wanted)


def this_node() -> str:
    """Ray's id of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id()


def draining() -> dict[str, PreemptionNotice]:
    """The nodes that Ray will take away, by id, with the end that was set for each."""
    found = _ray_compat.drain_deadlines_ms()
    return {
        node: PreemptionNotice(
            "ray", ms / 1e3 if ms else time() + _DRAIN_S, "the node is being drained"
        )
        for node, ms in found.items()
    }


def drain(node: str, notice: PreemptionNotice) -> None:
    """Let Ray start nothing more on a node whose machine will be taken away."""
    _ray_compat.drain_node(
        node, detail=f"{notice.source}: {notice.detail}", deadline_ms=int(notice.deadline * 1e3)
    )


def room_for(where: Placement) -> int:
    """How many such processes fit into what is free, on nodes that will stay."""
    return _room_in(_ray_compat.free_resources(), where)


def room_at_most(where: Placement) -> int:
    """How many would fit there if nothing else ran."""
    return _room_in(_ray_compat.total_resources(), where)


def _room_in(resources_by_node: Mapping[str, Mapping[str, float]], where: Placement) -> int:
    leaving = draining()
    return sum(
        how_many_fit(there, where)
        for node, there in resources_by_node.items()
        if node not in leaving
    )


def who_does_not_see(path: Path, crews: Collection[Placement]) -> list[str]:
    """The addresses of the other machines with resources for one of a crew on which there is no
    such file, or nobody who could tell."""
    resources = _ray_compat.total_resources()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != this_node()]
    fitting = [
        node
        for node in others
        if any(how_many_fit(resources.get(node["NodeID"], {}), crew) for crew in crews)
    ]
    asked = {
        ask_node(node["NodeID"], os.path.exists, path): node["NodeManagerAddress"]
        for node in fitting
    }
    answered, silent = (
        ray.wait([*asked], num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
    )
    return sorted(
        asked[answer] for answer in (*silent, *answered) if answer in silent or not _sees(answer)
    )


def _sees(answer: Any) -> bool:
    try:
        return bool(ray.get(answer))
    except ray.exceptions.RayTaskError:
        return False
    except ray.exceptions.RayError:  # the machine has just gone
        return True
