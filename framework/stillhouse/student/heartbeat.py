"""A rank's line to the driver: progress and heartbeats go out, and a stop request to commit and
leave comes back.

It beats in a thread of its own, so a rank whose training hangs still says where: its beat then
carries the stacks of all its threads.
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
from stillhouse.student.job import TrainJob
from stillhouse.student.loader import refuse_bad_chunk

_log = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0


class DriverLink(Protocol):
    """What the training loop tells, and what it is told."""

    @property
    def stop_request(self) -> StopRequest | None:
        """What the group is asked to do, as far as this rank knows: it may be ahead of the
        others."""

    def begin(self, committed_step: int) -> PreviousAttempt | None:
        """The group begins from a commit; one rank calls this. How its life before this one ended;
        None where it had none."""

    def at(self, step: int, phase: Phase) -> None:
        """The rank enters a phase of a step, counted from 1."""

    def reading(self, chunk: int | None) -> None:
        """A thread of the rank begins to read a chunk, which may never return; None: the read has
        ended."""

    def stepped(self, step: int, chunks_finished: int) -> None:
        """The group has taken a step, and needs so many chunks of the reading order never again;
        one rank calls this."""

    def explain(self, cause: Cause, detail: str) -> None:
        """Why the group is about to leave; one rank calls this."""

    def report_bad_chunk(self, number: int) -> None:
        """This rank found a chunk damaged. Raises StudentError where no teacher is there to replace
        it."""


class CoordinatorLink:
    """A link over the coordinator, alive for as long as the block lasts; it also listens to what
    the machine says of its end."""

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
        self._coordinator, self._group, self._rank, self._world_size = (
            coordinator,
            job.role,
            rank,
            world_size,
        )
        self._teachers_at_work = teachers_at_work
        self._stop_request: tuple[StopRequest, float] | None = (
            None  # with the moment at which it came
        )
        self._stall_s = job.section.watchdog_s
        self._node = this_node()
        self._place: tuple[int, Phase, float] = (0, "start", monotonic())
        self._read: tuple[int, float] | None = None  # the chunk, and since when
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._heartbeats, name="heartbeat", daemon=True)
        self._machine = machine_notices(
            notices, on_notice=lambda notice: coordinator.announce(self._node, notice)
        )

    def __enter__(self) -> Self:
        self._machine.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._coordinator.forget(self._group, rank=self._rank)
        self._machine.__exit__(None, None, None)

    @property
    def stop_request(self) -> StopRequest | None:
        if self._stop_request is None:
            return None
        stop_request, came = self._stop_request
        return replace(stop_request, seconds_left=stop_request.seconds_left - (monotonic() - came))

    def begin(self, committed_step: int) -> PreviousAttempt | None:
        return self._coordinator.begin(self._group, committed_step=committed_step)

    def at(self, step: int, phase: Phase) -> None:
        self._place = (step, phase, monotonic())

    def reading(self, chunk: int | None) -> None:
        self._read = None if chunk is None else (chunk, monotonic())

    def stepped(self, step: int, chunks_finished: int) -> None:
        self._coordinator.stepped(self._group, step)
        self._coordinator.move_cursor(self._group, chunks_finished)

    def explain(self, cause: Cause, detail: str) -> None:
        self._coordinator.explain(self._group, cause, detail)

    def report_bad_chunk(self, number: int) -> None:
        if not self._teachers_at_work:
            refuse_bad_chunk(number)
        self._coordinator.report_bad_chunk(number)

    def _heartbeats(self) -> None:
        while not self._stopped.wait(_HEARTBEAT_S):
            try:
                self._heartbeat()
            except Exception as error:
                _log.debug("a heartbeat did not arrive: %r", error)
                # a beat that does not arrive is missed by the driver; it must not end the rank
                continue

    def _heartbeat(self) -> None:
        step, phase, since = self._place
        chunk, read = None, self._read
        if phase == "data" and read is not None:
            phase, (chunk, since) = "reading", read
        phase_s = monotonic() - since
        stack = (
            stacks() if phase_s > self._stall_s and phase in ("reading", "step", "snapshot") else ""
        )
        asked = monotonic()
        heartbeat = Heartbeat(
            self._group,
            self._rank,
            self._world_size,
            self._node,
            os.getpid(),
            step,
            phase,
            phase_s,
            stack,
            chunk,
        )
        stop_request = self._coordinator.heartbeat(heartbeat)
        if stop_request is not None:
            if self._stop_request is None:
                _log.info("the group is asked to commit and leave: %s", stop_request)
            self._stop_request = (stop_request, asked)


def stacks() -> str:
    """The stack of every thread of this process but the one that asks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )
