"""The workers of a run: teachers as a crew for the pool, and student ranks that train while the
driver does something else."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from stillhouse.cluster.processes import local_secrets
from stillhouse.config import TeacherSection
from stillhouse.pipeline.session import Session
from stillhouse.store import ChunkStore
from stillhouse.student.job import TrainJob
from stillhouse.student.workers import fit
from stillhouse.teacher.actor import TeacherJob
from stillhouse.teacher.ray_backend import RayBackend

_LOOK_EVERY_S = 1.0


def teacher_crew(session: Session, section: TeacherSection, store: ChunkStore) -> RayBackend:
    """Teachers that fill this store."""
    return RayBackend(
        TeacherJob(
            section, store.recipe, store.url, session.cluster.threads, session.cluster.notices
        ),
        where=session.place_of(section),
        secrets=local_secrets(),
        coordinator=session.coordinator,
    )


def start_students(
    session: Session, jobs: Sequence[TrainJob], *, owner: int, teachers_at_work: bool
) -> "Background":
    """Have ranks train the jobs, one job after the other, for the command that owns their
    checkpoints under this number."""
    return Background(
        lambda: fit(
            [replace(job, owner=owner) for job in jobs],
            where=session.place_of(jobs[0].section),
            threads=session.cluster.threads,
            secrets=local_secrets(),
            notices=session.cluster.notices,
            coordinator=session.coordinator,
            teachers_at_work=teachers_at_work,
            journal=session.journal,
        )
    )


class Background:
    """A call in a thread of its own: Ray Train's `fit` would take the main thread's Ctrl-C away."""

    def __init__(self, call: Callable[[], None]):
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(call,), name="students", daemon=True
        )
        self._thread.start()

    def join(self, *, unless: Callable[[], bool]) -> None:
        """Wait until the call has returned, unless it is given up. Raises what it raised."""
        while not (self.finished() or unless()):
            # a wait without end would not hear a Ctrl-C on every system
            self._thread.join(_LOOK_EVERY_S)

    def finished(self) -> bool:
        """Whether the call has returned. Raises what it raised."""
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._error = error
