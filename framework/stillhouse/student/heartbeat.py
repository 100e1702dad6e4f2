"""A rank's link to the driver: heartbeats and progress go out, and a stop request, to commit and to
leave, comes back.

Heartbeats are sent by a thread, so that a rank whose training hangs still reports where: its
heartbeat then carries the stacks of all its threads.
"""

import logging
import os
import sys
import threading
import traceback
from dataclasses import replace
from time import monotonic
from typing import Protocol, Self

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.heartbeat import Cause, Heartbeat, Phase, PreviousAttempt, StopRequest
from stillhouse.cluster.nodes import machine_notices, this_node
from stillhouse.config import NoticeSource
from stillhouse.student.fetching import refuse_bad_chunk
from stillhouse.student.job import TrainJob

_log = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
_WITH_STACK = (
    "reading",
    "step",
    "evaluate",
    "snapshot",
)  # phases that no rank should be in for long


class DriverLink(Protocol):
    """What the training loop reports to the driver, and what comes back."""

    @property
    def stop_request(self) -> StopRequest | None:
        """The request to commit and leave, None before it has reached this rank: it may reach the
        ranks at different moments."""

    def begin(self, committed_step: int) -> PreviousAttempt | None:
        """The group begins from a commit; one rank calls this. Returns how its life before this one
        ended; None where there was none."""

    def at(self, step: int, phase: Phase) -> None:
        """The rank enters a phase of a step, counted from 1."""

    def reading(self, chunk: int | None) -> None:
        """A thread of the rank begins to read a chunk, which may never return; None: the read has
        ended."""

    def stepped(self, step: int, chunks_finished: int) -> None:
        """The group has taken a step, and will not read so many chunks at the front of the reading
        order again; one rank calls this."""

    def explain(self, cause: Cause, detail: str) -> None:
        """Why the group is about to leave; one rank calls this."""

    def report_bad_chunk(self, number: int) -> None:
        """This rank found a chunk damaged. Raises StudentError where no teacher is there to replace
        it."""


class CoordinatorLink:
    """The `DriverLink` over the coordinator, open for as long as the block lasts. It also listens
    for preemption notices of this machine."""

    def __init__(
        self,
        coordinator: Coordinator,
        job: TrainJob,
        notices: NoticeSource,
        *,
        rank: int,
        world_size: int,
        teachers_at_work: bool,
    ) -> None:
        node = this_node()
        self._coordinator, self._job = coordinator, job
        self._teachers_at_work = teachers_at_work
        self._template = Heartbeat(
            job.role, rank, world_size, node, os.getpid(), step=0, phase="start", phase_s=0.0
        )
        self._phase: tuple[int, Phase, float] = (0, "start", monotonic())  # step, phase, since when
        self._read: tuple[int, float] | None = None  # the chunk, and since when
        self._stop_request: tuple[StopRequest, float] | None = None  # and when it came
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._heartbeats, name="heartbeat", daemon=True)
        self._machine = machine_notices(
            notices, on_notice=lambda notice: coordinator.announce(node, notice)
        )

    def __enter__(self) -> Self:
        self._machine.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._coordinator.forget(self._job.role, rank=self._template.rank)
        self._machine.__exit__(None, None, None)

    @property
    def stop_request(self) -> StopRequest | None:
        if self._stop_request is None:
            return None
        stop_request, came = self._stop_request
        return replace(stop_request, seconds_left=stop_request.seconds_left - (monotonic() - came))

    def begin(self, committed_step: int) -> PreviousAttempt | None:
        return self._coordinator.begin(self._job.role, committed_step=committed_step)

    def at(self, step: int, phase: Phase) -> None:
        self._phase = (step, phase, monotonic())

    def reading(self, chunk: int | None) -> None:
        self._read = None if chunk is None else (chunk, monotonic())

    def stepped(self, step: int, chunks_finished: int) -> None:
        self._coordinator.stepped(self._job.role, step)
        self._coordinator.move_cursor(self._job.role, chunks_finished)

    def explain(self, cause: Cause, detail: str) -> None:
        self._coordinator.explain(self._job.role, cause, detail)

    def report_bad_chunk(self, number: int) -> None:
        if not self._teachers_at_work:
            refuse_bad_chunk(number)
        self._coordinator.report_bad_chunk(number)

    def _heartbeats(self) -> None:
        while not self._stopped.wait(_HEARTBEAT_S):
            try:
                self._heartbeat()
            except Exception as error:
                # the driver misses a heartbeat that does not arrive; it must not end the rank
                _log.debug("a heartbeat did not arrive: %r", error)

    def _heartbeat(self) -> None:
        """Send one heartbeat; its answer may be a stop request."""
        # where this rank is
        step, phase, since = self._phase
        chunk, read = None, self._read
        if phase == "data" and read is not None:
            phase, (chunk, since) = "reading", read
        phase_s = monotonic() - since
        is_stalled = phase_s > self._job.section.watchdog_s and phase in _WITH_STACK
        heartbeat = replace(
            self._template,
            step=step,
            phase=phase,
            phase_s=phase_s,
            stack=stacks() if is_stalled else "",
            chunk=chunk,
        )
        # a request's seconds count from when the heartbeat was sent
        sent = monotonic()
        stop_request = self._coordinator.heartbeat(heartbeat)
        if stop_request is not None:
            if self._stop_request is None:
                _log.info("the group has to commit and leave: %s", stop_request)
            self._stop_request = (stop_request, sent)


def stacks() -> str:
    """The stacks of all threads of this process but the calling one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )
