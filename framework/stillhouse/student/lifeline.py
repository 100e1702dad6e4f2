"""A rank's line to the driver: progress and signs of life go out, and a summons to commit and leave comes back.

It beats in a thread of its own, so a rank whose training hangs still says where: its beat then carries the stacks of all its threads.
"""

import logging
import os
import sys
import threading
import traceback
from dataclasses import replace
from time import monotonic
from typing import Protocol, Self

from stillhouse.cluster.coordinator import Beat, Board, Cause, Past, Phase, Summons
from stillhouse.cluster.nodes import machine_notices, this_node
from stillhouse.config import NoticeSource
from stillhouse.student.job import TrainJob
from stillhouse.student.loader import refuse_bad_chunk

_log = logging.getLogger(__name__)

_BEAT_S = 1.0


class Lifeline(Protocol):
    """What the training loop tells, and what it is told."""

    @property
    def summons(self) -> Summons | None:
        """What the group is asked to do, as far as this rank knows: it may be ahead of the others."""

    def begin(self, committed_step: int) -> Past | None:
        """The group begins from a commit; one rank calls this. How its life before this one ended; None where it had none."""

    def at(self, step: int, phase: Phase) -> None:
        """The rank enters a phase of a step, counted from 1."""

    def reading(self, chunk: int | None) -> None:
        """A thread of the rank begins to read a chunk, which may never return; None: the read has ended."""

    def stepped(self, step: int, chunks_finished: int) -> None:
        """The group has taken a step, and needs so many chunks of the reading order never again; one rank calls this."""

    def explain(self, cause: Cause, detail: str) -> None:
        """Why the group is about to leave; one rank calls this."""

    def report_bad_chunk(self, number: int) -> None:
        """This rank found a chunk damaged. Raises StudentError where no teacher is there to replace it."""


class BoardLifeline:
    """A lifeline over the board, alive for as long as the block lasts; it also listens to what the machine says of its end."""

    def __init__(self, board: Board, job: TrainJob, notices: NoticeSource, *, rank: int, world_size: int, teachers_at_work: bool) -> None:
        self._board, self._group, self._rank, self._world_size = board, job.role, rank, world_size
        self._teachers_at_work = teachers_at_work
        self._summons: tuple[Summons, float] | None = None  # with the moment at which it came
        self._stall_s = job.section.watchdog_s
        self._node = this_node()
        self._place: tuple[int, Phase, float] = (0, "start", monotonic())
        self._read: tuple[int, float] | None = None  # the chunk, and since when
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lifeline", daemon=True)
        self._machine = machine_notices(notices, on_notice=lambda notice: board.announce(self._node, notice))

    def __enter__(self) -> Self:
        self._machine.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._board.forget(self._group, rank=self._rank)
        self._machine.__exit__(None, None, None)

    @property
    def summons(self) -> Summons | None:
        if self._summons is None:
            return None
        summons, came = self._summons
        return replace(summons, seconds_left=summons.seconds_left - (monotonic() - came))

    def begin(self, committed_step: int) -> Past | None:
        return self._board.begin(self._group, committed_step=committed_step)

    def at(self, step: int, phase: Phase) -> None:
        self._place = (step, phase, monotonic())

    def reading(self, chunk: int | None) -> None:
        self._read = None if chunk is None else (chunk, monotonic())

    def stepped(self, step: int, chunks_finished: int) -> None:
        self._board.stepped(self._group, step)
        self._board.move_cursor(self._group, chunks_finished)

    def explain(self, cause: Cause, detail: str) -> None:
        self._board.explain(self._group, cause, detail)

    def report_bad_chunk(self, number: int) -> None:
        if not self._teachers_at_work:
            refuse_bad_chunk(number)
        self._board.report_bad_chunk(number)

    def _beat_on(self) -> None:
        while not self._stopped.wait(_BEAT_S):
            try:
                self._beat()
            except Exception as error:
                _log.debug("a heartbeat did not arrive: %r", error)
                continue  # a beat that does not arrive is missed by the driver; it must not end the rank

    def _beat(self) -> None:
        step, phase, since = self._place
        chunk, read = None, self._read
        if phase == "data" and read is not None:
            phase, (chunk, since) = "reading", read
        phase_s = monotonic() - since
        stack = stacks() if phase_s > self._stall_s and phase in ("reading", "step", "snapshot") else ""
        asked = monotonic()
        beat = Beat(self._group, self._rank, self._world_size, self._node, os.getpid(), step, phase, phase_s, stack, chunk)
        summons = self._board.beat(beat)
        if summons is not None:
            if self._summons is None:
                _log.info("the group is asked to commit and leave: %s", summons)
            self._summons = (summons, asked)


def stacks() -> str:
    """The stack of every thread of this process but the one that asks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )
