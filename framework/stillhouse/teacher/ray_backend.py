"""`RayBackend`: the pool's worker backend that runs teachers as Ray actors.

A dead actor is reported once, as `Died`, whatever it was doing; no call waits for it.
"""

from functools import partial
from time import sleep
from typing import Any, NamedTuple

import ray

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.interpreters import Interpreters
from stillhouse.cluster.nodes import nodes_with_room
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import Secrets, cause_of
from stillhouse.pool.events import Answered, Computed, Died, Event, Raised, Started
from stillhouse.sequence import WorkItem
from stillhouse.teacher.actor import Ready, TeacherJob, spawn

_ASKED_S = 90.0  # for the machines' answers about their interpreters, before the first teacher
_NODE_DIED = "its node has died"  # Ray's wording: its error has no attribute for it


class _Call(NamedTuple):
    worker: int
    lease: int | None  # None: the start-up check
    is_first: bool = False  # the chunk is computed; the answer comes of the call that publishes it


class RayBackend:
    """Starts a teacher of `job` under each worker number, where the cluster has resources for it.

    Raises ConfigError, here and in `events`, where a machine cannot start `teacher.python`.
    """

    def __init__(
        self, job: TeacherJob, *, where: Placement, secrets: Secrets, coordinator: Coordinator
    ):
        self._job, self._where, self._secrets, self._coordinator = job, where, secrets, coordinator
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, _Call] = {}
        python = job.section.python
        self._interpreters: Interpreters | None = None
        if python is not None:
            self._interpreters = Interpreters(python, partial(nodes_with_room, [where]))
            self._interpreters.require(timeout_s=_ASKED_S)

    def spawn(self, worker: int) -> None:
        actor = spawn(
            self._job,
            worker,
            where=self._where,
            secrets=self._secrets,
            coordinator=self._coordinator,
        )
        self._actors[worker] = actor
        self._calls[actor.start.remote()] = _Call(worker, None)

    def submit(self, worker: int, lease: int, item: WorkItem, *, publish: bool) -> None:
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

    def events(self, *, timeout_s: float) -> list[Event[Ready]]:
        if not self._calls:
            # no teacher works: the window is closed, or only students have work left
            sleep(timeout_s)
            return []
        if self._interpreters is not None and any(c.lease is None for c in self._calls.values()):
            self._interpreters.require(timeout_s=0.0)  # of machines that have joined since
        waiting = list(self._calls)
        done, _ = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if done:
            # all other answers that have arrived by now
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        found = [self._event(reference, self._calls.pop(reference)) for reference in done]
        return [event for event in found if event is not None]

    def _event(self, reference: Any, call: _Call) -> Event[Ready] | None:
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
