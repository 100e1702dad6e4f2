"""What the driver hears of the run's machines: it passes every announced end on to those whom it
concerns, and into the journal.

Machines speak through the coordinator, Ray says which nodes it drains, and a SIGTERM to the driver
is the end of everything.
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
from stillhouse.errors import HeadGoneError, InterruptedRunError, StoreUnavailable
from stillhouse.terminal import say
from stillhouse.tracking import NoticeRow, Role, Tracker

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_SILENT_S = 8.0  # a rank that lives beats every second
# for the thread to end its look: a call to Ray while Ray shuts down would end the whole process
_STOP_S, _STOP_WITHOUT_HEAD_S = 60.0, 5.0
_ROLES: tuple[Role, ...] = ("student", "control")


class Machines:
    """The run's machines, as far as their end is announced."""

    def __init__(self, coordinator: Coordinator, journal: Tracker, terminated: Ask) -> None:
        """`journal` must not wait: a row for which it raises StoreUnavailable is kept, and recorded
        later."""
        self._coordinator, self._journal, self._terminated = coordinator, journal, terminated
        self.known: dict[str, PreemptionNotice] = {}
        self._unwritten: list[NoticeRow] = []
        self._told_at: float | None = None
        self._seconds_left = 0.0  # then
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="machines", daemon=True)

    def require_driver(self) -> None:
        """Raise InterruptedRunError where the driver itself was told to go."""
        if self._terminated(time()) is not None:
            raise InterruptedRunError(
                "SIGTERM; what was committed stays, and the same command goes on from there"
            )

    def nobody_commits(self) -> bool:
        """Whether the driver was told to go a while ago, and no rank is at work that would have to
        commit first."""
        if self._told_at is None or monotonic() - self._told_at < _SILENT_S:
            return False
        return not any(
            heard.ago_s < _SILENT_S for role in _ROLES for heard in self._coordinator.heard(role)
        )

    def pause(self, seconds: float) -> None:
        """Sleep, for who waits for room. Raises InterruptedRunError once a driver that was told to
        go has no time left."""
        sleep(seconds)
        end = self._terminated(time())
        if end is not None and time() >= end.deadline:
            self.require_driver()

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, within_s: float = _STOP_S) -> None:
        """Listen no more; returns once the thread has ended, or after so many seconds."""
        self._stopped.set()
        self._thread.join(within_s)

    def _listen(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY_S):
            with suppress(
                HeadGoneError
                # where that is so, whoever attached to the cluster says it; a question may also
                # fail once
            ):
                self._look()

    def _look(self) -> None:
        """Take in and pass on. What the coordinator knew and lost with its process is told to it
        again."""
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
        """Rows that are due. While the journal's disk is full they are kept for the next look:
        nobody may wait for them."""
        with suppress(StoreUnavailable):
            while self._unwritten:
                self._journal.record(self._unwritten[0])
                del self._unwritten[0]

    def _pass_on(self, node: str, notice: PreemptionNotice) -> None:
        seconds_left = notice.deadline - time()
        _log.warning(
            "node %s ends in %.0f s: %s: %s", node, seconds_left, notice.source, notice.detail
        )
        self._unwritten.append(
            NoticeRow(notice.source, node, seconds_left, notice.detail, time=time())
        )
        if notice.source != "ray":
            drain(node, notice)

    def _stop_all(self, notice: PreemptionNotice) -> None:
        if self._told_at is None:
            self._told_at, self._seconds_left = monotonic(), notice.deadline - time()
            _log.warning(
                "%s: students commit and leave within %.0f s", notice.detail, self._seconds_left
            )
            self._unwritten.append(
                NoticeRow(notice.source, "driver", self._seconds_left, notice.detail, time=time())
            )
        seconds_left = self._seconds_left - (monotonic() - self._told_at)
        for role in _ROLES:
            self._coordinator.request_stop(role, StopRequest("stop", seconds_left, notice.detail))


@contextmanager
def watched_machines(
    coordinator: Coordinator, journal: Tracker, *, grace_s: float
) -> Iterator[Machines]:
    """Listen for as long as the block lasts."""
    with sigterm(grace_s) as terminated:
        machines = Machines(coordinator, journal, terminated)
        machines.start()
        patience_s = _STOP_S
        try:
            yield machines
        except (HeadIsGone, HeadGoneError):
            patience_s = _STOP_WITHOUT_HEAD_S  # a call to a head that is gone does not return
            machines.require_driver()  # a SIGTERM to all processes of a machine ends its head, too
            raise
        finally:
            machines.stop(within_s=patience_s)
