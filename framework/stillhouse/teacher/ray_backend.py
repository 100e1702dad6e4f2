"""`RayBackend`: the pool's worker backend that runs teachers as Ray actors."""

from functools import partial

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import Secrets
from stillhouse.pool.actor_backend import ActorBackend
from stillhouse.sequence import WorkItem
from stillhouse.teacher.actor import Ready, TeacherJob, spawn


class RayBackend(ActorBackend[WorkItem, Ready]):
    """Starts a teacher of `job` under each worker number, where the cluster has resources for
    it."""

    def __init__(
        self, job: TeacherJob, *, where: Placement, secrets: Secrets, coordinator: Coordinator
    ):
        super().__init__(partial(spawn, job, where=where, secrets=secrets, coordinator=coordinator))
