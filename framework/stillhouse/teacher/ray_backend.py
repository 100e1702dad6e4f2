"""`RayBackend`: the pool's worker backend that runs teachers as Ray actors."""

from functools import partial

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.interpreters import Interpreters
from stillhouse.cluster.nodes import nodes_with_room
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import Secrets
from stillhouse.pool.actor_backend import ActorBackend
from stillhouse.pool.events import Event
from stillhouse.sequence import WorkItem
from stillhouse.teacher.actor import Ready, TeacherJob, spawn

_ASKED_S = 90.0  # for the machines' answers about their interpreters, before the first teacher


class RayBackend(ActorBackend[WorkItem, Ready]):
    """Starts a teacher of `job` under each worker number, where the cluster has resources for it.

    Raises ConfigError, here and in `events`, where a machine cannot start `teacher.python`.
    """

    def __init__(
        self, job: TeacherJob, *, where: Placement, secrets: Secrets, coordinator: Coordinator
    ):
        super().__init__(partial(spawn, job, where=where, secrets=secrets, coordinator=coordinator))
        python = job.section.python
        self._interpreters: Interpreters | None = None
        if python is not None:
            self._interpreters = Interpreters(python, partial(nodes_with_room, [where]))
            self._interpreters.require(timeout_s=_ASKED_S)

    def events(self, *, timeout_s: float) -> list[Event[Ready]]:
        if self._interpreters is not None and self.is_starting_one:
            self._interpreters.require(timeout_s=0.0)  # of machines that have joined since
        return super().events(timeout_s=timeout_s)
