"""Preemption notices at the driver: each is passed on to Ray, to the teacher pool and to the
students, and journalled.

They come from the machines, through the coordinator, and from Ray, which says which nodes it
drains. A SIGTERM to the driver stops the whole run.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep, time

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.head_process import HeadIsGone
from stillhouse.cluster.heartbeat import StopRequest
from stillhouse.cluster.nodes import drain, draining
from stillhouse.cluster.preemption import Ask, PreemptionNotice, sigterm
from stillhouse.errors import (
    HeadGoneError,
    InterruptedRunError,
    StillhouseError,
    StoreUnavailable,
)
from stillhouse.terminal import say
from stillhouse.tracking import NoticeEvent, Role, Tracker

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_SILENT_S = 8.0  # a rank at work gives a heartbeat every second
# for the thread to end its look: a call to Ray while Ray shuts down would end the whole process
_STOP_S, _STOP_WITHOUT_HEAD_S = 60.0, 5.0
_ROLES: tuple[Role, ...] = ("student", "control")


class Machines:
    """A thread that listens for preemption notices of the run's machines.

    `journal` must not wait: an event for which it raises StoreUnavailable is kept, and recorded
    later. `terminated` is the driver's own notice, by SIGTERM.
    """

    def __init__(self, coordinator: Coordinator, journal: Tracker, terminated: Ask) -> None:
        self._coordinator = coordinator
        self._journal = journal
        self._terminated = terminated
        self.known: dict[str, PreemptionNotice] = {}  # by node
        self._unwritten: list[NoticeEvent] = []
        self._told_at: float | None = None  # when the driver's own notice was taken in
        self._seconds_left = 0.0  # at that time
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="machines", daemon=True)

    def require_driver(self) -> None:
        """Raise InterruptedRunError where the driver itself got a SIGTERM."""
        if self._terminated(time()) is not None:
            raise InterruptedRunError(
                "SIGTERM; what was committed stays, and the same command goes on from there"
            )

    def no_rank_commits(self) -> bool:
        """Whether the driver got a SIGTERM some seconds ago, and no rank is at work that would have
        to commit first."""
        if self._told_at is None or monotonic() - self._told_at < _SILENT_S:
            return False
        return not any(
            heard.ago_s < _SILENT_S for role in _ROLES for heard in self._coordinator.heard(role)
        )

    def pause(self, seconds: float) -> None:
        """Sleep while room is waited for. Raises InterruptedRunError once a driver that got a
        SIGTERM has no time left."""
        sleep(seconds)
        end = self._terminated(time())
        if end is not None and time() >= end.deadline:
            self.require_driver()

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, within_s: float = _STOP_S) -> None:
        """End the thread, and wait for that, but no longer than `within_s`."""
        self._stopped.set()
        self._thread.join(within_s)

    def _listen(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY_S):
            with suppress(HeadGoneError):  # `attached` reports it; and one question alone may fail
                self._look()

    def _look(self) -> None:
        """Take in what is new and pass it on. A coordinator that was started again is told again
        what it has lost."""
        for words in self._coordinator.take_messages():
            say(words, error=True)
        for node, notice in draining().items():
            self._coordinator.announce(node, notice)
        notices = self._coordinator.notices()
        for node, notice in notices.items():
            if node not in self.known:
                self._pass_on(node, notice)
            self.known[node] = notice
        for node in self.known.keys() - notices.keys():
            self._coordinator.announce(node, self.known[node])
        end = self._terminated(time())
        if end is not None:
            self._stop_all(end)
        self._write_down()

    def _write_down(self) -> None:
        """Journal the events that are due. While the journal's disk is full they are kept for the
        next look."""
        with suppress(StoreUnavailable):
            while self._unwritten:
                self._journal.record(self._unwritten[0])
                del self._unwritten[0]

    def _note(self, machine: str, notice: PreemptionNotice) -> None:
        left_s, source, detail = notice.deadline - time(), notice.source, notice.detail
        _log.warning("preemption notice for %s, %.0f s: %s: %s", machine, left_s, source, detail)
        self._unwritten.append(NoticeEvent(source, machine, left_s, detail, time=time()))

    def _pass_on(self, node: str, notice: PreemptionNotice) -> None:
        self._note(node, notice)
        if notice.source != "ray":
            drain(node, notice)

    def _stop_all(self, notice: PreemptionNotice) -> None:
        if self._told_at is None:
            self._told_at, self._seconds_left = monotonic(), notice.deadline - time()
            self._note("driver", notice)
        seconds_left = self._seconds_left - (monotonic() - self._told_at)
        for role in _ROLES:
            self._coordinator.request_stop(role, StopRequest("stop", seconds_left, notice.detail))


@contextmanager
def watched_machines(
    coordinator: Coordinator, journal: Tracker, *, grace_s: float
) -> Iterator[Machines]:
    """Listen for as long as the block lasts. `grace_s`: what a SIGTERM gives the driver."""
    with sigterm(grace_s) as terminated:
        machines = Machines(coordinator, journal, terminated)
        machines.start()
        patience_s = _STOP_S
        try:
            yield machines
        except BaseException as error:
            if head_may_be_gone(error):
                patience_s = _STOP_WITHOUT_HEAD_S
            if isinstance(error, HeadIsGone | HeadGoneError):
                machines.require_driver()  # a SIGTERM to a whole machine ends its head, too
            raise
        finally:
            machines.stop(within_s=patience_s)


def head_may_be_gone(error: BaseException | None) -> bool:
    """Whether a block may be left by this error because the cluster's head is gone: then calls to
    Ray do not return. Errors of Ray's may come of that, ours do not."""
    if isinstance(error, HeadIsGone | HeadGoneError):
        return True
    return isinstance(error, Exception) and not isinstance(error, StillhouseError)
