"""The students of a run: ranks that train in a thread while the driver does something else."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from stillhouse.cluster.processes import local_secrets
from stillhouse.pipeline.machines import head_may_be_gone
from stillhouse.pipeline.session import Session
from stillhouse.student.job import HeldoutPlan, TrainJob
from stillhouse.student.workers import fit, give_up

_LOOK_EVERY_S = 1.0
_END_S, _GIVE_UP_EVERY_S = 20.0, 0.5  # for the call to end


def students_at_work(
    session: Session,
    jobs: Sequence[TrainJob],
    *,
    owner: int,
    heldout: HeldoutPlan | None,
    with_teachers: bool = False,
) -> "Background":
    """Ranks that train the jobs, one after the other, for as long as the block lasts.

    `owner`: the number under which the command owns their checkpoints. `heldout`: how they are
    scored meanwhile, None where they are not. `with_teachers`: chunks that
    are missing are being made.
    """

    def train() -> None:
        fit(
            [replace(job, owner=owner, heldout=heldout) for job in jobs],
            where=session.place_of(jobs[0].section),
            threads=session.cluster.threads,
            secrets=local_secrets(),
            notices=session.cluster.notices,
            coordinator=session.coordinator,
            teachers_at_work=with_teachers,
            journal=session.journal,
        )

    return Background(train, give_up=give_up)


class Background:
    """A call in a thread of its own, for as long as the block lasts: in the main thread, Ray
    Train's `fit` would replace the handler of Ctrl-C.

    Where the block is left early, `give_up` has to end the call: a thread that calls Ray while Ray
    shuts down ends the whole process. Not so where the cluster's head may be gone: no call to it
    returns.
    """

    def __init__(self, call: Callable[[], None], *, give_up: Callable[[], None]) -> None:
        self._call = call
        self._give_up = give_up
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="students", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if not head_may_be_gone(error):
            self._end()

    def join(self, *, unless: Callable[[], bool]) -> None:
        """Wait until the call has returned or `unless()`. Raises what the call raised."""
        while not (self.finished() or unless()):
            # with a timeout: on some systems Ctrl-C does not interrupt a wait without one
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

        In another thread: where the head is lost at this moment, Ray does not answer, and the main
        thread has to stay open to `HeadIsGone`.
        """

        def give_up() -> None:
            while self._thread.is_alive():
                self._give_up()
                self._thread.join(_GIVE_UP_EVERY_S)

        thread = threading.Thread(target=give_up, name="give-up", daemon=True)
        thread.start()
        thread.join(_END_S)
