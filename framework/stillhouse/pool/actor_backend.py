"""`ActorBackend`: a pool's worker backend whose workers are Ray actors.

A dead actor is reported once, as `Died`, whatever it was doing; no call waits for it.
"""

from collections.abc import Callable
from functools import partial
from time import sleep
from typing import Any, Generic, NamedTuple

import ray

from stillhouse.cluster.interpreters import Interpreters, runtime_env_of
from stillhouse.cluster.nodes import nodes_with_room
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import cause_of
from stillhouse.config import PoolSection
from stillhouse.pool.events import (
    Answered,
    Computed,
    Died,
    Event,
    ItemT_contra,
    Raised,
    ReadyT,
    Started,
)

_ASKED_S = 90.0  # for the machines' answers about their interpreters, before the first actor
_NODE_DIED = "its node has died"  # Ray's wording: its error has no attribute for it


def interpreters_of(section: PoolSection, where: Placement) -> Interpreters | None:
    """The interpreters of a pool's own on the machines that have room for its actors, if the config
    names one."""
    if section.python is None:
        return None
    return Interpreters(section.python, partial(nodes_with_room, [where]), table=section.table)


def actor_options(section: PoolSection, where: Placement) -> dict[str, Any]:
    """What Ray is told of an actor of a pool."""
    return {
        "num_cpus": where.num_cpus,
        "num_gpus": where.num_gpus,
        "resources": dict(where.resources) or None,
        "runtime_env": None if section.python is None else runtime_env_of(section.python),
    }


class _Call(NamedTuple):
    worker: int
    lease: int | None  # None: the start-up check
    is_first: bool = False  # the block is computed; the answer comes of the call that publishes it


class ActorBackend(Generic[ItemT_contra, ReadyT]):
    """Starts an actor under each worker number, where the cluster has resources for it.

    `start_actor(number)` gives a new actor at once, with the methods `start`, its start-up check;
    `produce` and `publish`, called once each for a block, in two threads, as `TwoStages` wants it;
    and `compute`, a trial. `interpreters`: of the actors, where they have one of their own.

    Raises ConfigError, here and in `events`, where a machine cannot start its interpreter.
    """

    def __init__(
        self, start_actor: Callable[[int], Any], *, interpreters: Interpreters | None = None
    ):
        self._start_actor, self._interpreters = start_actor, interpreters
        if interpreters is not None:
            interpreters.require(timeout_s=_ASKED_S)
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, _Call] = {}

    def spawn(self, worker: int) -> None:
        actor = self._actors[worker] = self._start_actor(worker)
        self._calls[actor.start.remote()] = _Call(worker, None)

    def submit(self, worker: int, lease: int, item: ItemT_contra, *, publish: bool) -> None:
        actor = self._actors[worker]
        if not publish:
            self._calls[actor.compute.remote(item)] = _Call(worker, lease)
            return
        self._calls[actor.produce.remote(item)] = _Call(worker, lease, is_first=True)
        self._calls[actor.publish.remote()] = _Call(worker, lease)

    def kill(self, worker: int) -> None:
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)

    def events(self, *, timeout_s: float) -> list[Event[ReadyT]]:
        if self._interpreters is not None and self._is_starting_one:
            self._interpreters.require(timeout_s=0.0)  # of machines that have joined since
        if not self._calls:
            # no worker has work: the window is closed, or only students have work left
            sleep(timeout_s)
            return []
        waiting = list(self._calls)
        done, _ = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if done:
            # all other answers that have arrived by now
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        found = [self._event(reference, self._calls.pop(reference)) for reference in done]
        return [event for event in found if event is not None]

    @property
    def _is_starting_one(self) -> bool:
        return any(call.lease is None for call in self._calls.values())

    def _event(self, reference: Any, call: _Call) -> Event[ReadyT] | None:
        if call.worker not in self._actors:
            return None  # killed by the pool, or reported as dead already
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            return Raised(call.worker, call.lease, cause_of(error))
        except ray.exceptions.RayError as error:
            # the actor or its node died, its answer was lost, or its machine ran out of memory
            self.kill(call.worker)
            preempted = isinstance(error, ray.exceptions.ActorDiedError) and error.preempted
            with_machine = preempted or _NODE_DIED in str(error)
            return Died(call.worker, str(error), with_machine=with_machine, preempted=preempted)
        if call.lease is None:
            return Started(call.worker, answer)
        if call.is_first:
            return Computed(call.worker, call.lease)
        return Answered(call.worker, call.lease, answer)
