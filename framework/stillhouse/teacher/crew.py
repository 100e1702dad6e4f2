"""Teachers as Ray actors: the pool's crew on a real cluster. An actor that dies is told once,
whatever it held; it is never waited for."""

from time import sleep
from typing import Any, NamedTuple

import ray

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import Secrets, cause_of
from stillhouse.pool.events import Answered, Died, Event, Raised, Started
from stillhouse.sequence import WorkItem
from stillhouse.teacher.actor import Ready, TeacherJob, spawn

_NODE_DIED = "its node has died"  # Ray's own words, in an error that carries nothing else of it


class _Call(NamedTuple):
    worker: int
    lease: int | None  # None: the start-up check


class RayCrew:
    """Starts a teacher of `job` for each number that it is given, where the cluster has a place for
    it."""

    def __init__(
        self, job: TeacherJob, *, where: Placement, secrets: Secrets, coordinator: Coordinator
    ):
        self._job, self._where, self._secrets, self._coordinator = job, where, secrets, coordinator
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, _Call] = {}

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
        method = actor.produce if publish else actor.compute
        self._calls[method.remote(item)] = _Call(worker, lease)

    def kill(self, worker: int) -> None:
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)

    def events(self, *, timeout_s: float) -> list[Event[Ready]]:
        if not self._calls:
            # nobody is at work: the window is closed, or the students are still at it
            sleep(timeout_s)
            return []
        waiting = list(self._calls)
        done, _ = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if done:
            # and all others that are there by now
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        found = [self._event(reference, self._calls.pop(reference)) for reference in done]
        return [event for event in found if event is not None]

    def _event(self, reference: Any, call: _Call) -> Event[Ready] | None:
        if call.worker not in self._actors:
            return None  # it was sent away, or its end is told already
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            return Raised(call.worker, call.lease, cause_of(error))
        except (
            ray.exceptions.RayError
        ) as error:  # the actor died, or its node, or its answer, or memory ran out there
            self.kill(call.worker)
            preempted = isinstance(error, ray.exceptions.ActorDiedError) and error.preempted
            return Died(
                call.worker,
                str(error),
                with_machine=preempted or _NODE_DIED in str(error),
                preempted=preempted,
            )
        return (
            Started(call.worker, answer)
            if call.lease is None
            else Answered(call.worker, call.lease, answer)
        )
