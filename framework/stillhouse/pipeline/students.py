"""The students of a run: ranks that train in a thread while the driver does something else."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from stillhouse.cluster.head_process import HeadIsGone
from stillhouse.cluster.processes import local_secrets
from stillhouse.errors import HeadGoneError
from stillhouse.pipeline.session import Session
from stillhouse.student.job import TrainJob
from stillhouse.student.workers import fit, give_up

_LOOK_EVERY_S = 1.0
_END_S, _GIVE_UP_EVERY_S = 20.0, 0.5


def students_at_work(
    session: Session, jobs: Sequence[TrainJob], *, owner: int, teachers_at_work: bool
) -> "Background":
    """Ranks that train the jobs, one after the other, for as long as the block lasts.

    `owner` is the number under which the command owns their checkpoints.
    """

    def train() -> None:
        fit(
            [replace(job, owner=owner) for job in jobs],
            where=session.place_of(jobs[0].section),
            threads=session.cluster.threads,
            secrets=local_secrets(),
            notices=session.cluster.notices,
            coordinator=session.coordinator,
            teachers_at_work=teachers_at_work,
            journal=session.journal,
        )

    return Background(train, give_up=give_up)


class Background:
    """A call in a thread of its own, for as long as the block lasts: Ray Train's `fit` would take
    Ctrl-C away from the main thread.

    A block that is left early ends the call by `give_up`: a thread that calls Ray while Ray shuts
    down ends the whole process. Where the cluster's head is gone, neither can be done.
    """

    def __init__(self, call: Callable[[], None], *, give_up: Callable[[], None]) -> None:
        self._call = call
        self._give_up = give_up
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="students", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, HeadIsGone | HeadGoneError):
            self._end()

    def join(self, *, unless: Callable[[], bool]) -> None:
        """Wait until the call has returned or `unless()`. Raises what the call raised."""
        while not (self.finished() or unless()):
            # a wait without a timeout would not hear a Ctrl-C on every system
            self._thread.join(_LOOK_EVERY_S)

    def finished(self) -> bool:
        """Whether the call has returned. Raises what it raised."""
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def _end(self) -> None:
        """Give up the call, again and again: it may be about to start what it waits for.

        From another thread: where the head has just gone, Ray does not answer, and the main thread
        has to hear of it.
        """

        def give_up() -> None:
            while self._thread.is_alive():
                self._give_up()
                self._thread.join(_GIVE_UP_EVERY_S)

        thread = threading.Thread(target=give_up, name="give-up", daemon=True)
        thread.start()
        thread.join(_END_S)
