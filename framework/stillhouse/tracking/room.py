"""Rows wait for room: a tracker that records a row again and again while the journal's disk is
full."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic, sleep, time

from stillhouse.retry import Patience, Tell, insist
from stillhouse.tracking.events import Row, Tracker

# A run whose journal waits stands still, so it says so soon. A local disk may be asked often.
ROOM_PATIENCE = Patience(tell_after_s=3.0, last_pause_s=2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientTracker:
    """Hands rows on to another tracker. While that one has no room for a row, the caller waits with
    it, so rows stay in order.

    `record` raises StoreUnavailable at the end of the patience, and what else the tracker raises at
    once. `tell` says on a terminal that the run waits: the journal cannot.
    """

    tracker: Tracker
    tell: Tell
    patience: Patience = ROOM_PATIENCE
    pause: Callable[[float], None] = sleep
    clock: Callable[[], float] = monotonic
    wall: Callable[[], float] = time

    def record(self, row: Row) -> None:
        # when it happened, not when there was room
        stamped = row if row.time else replace(row, time=self.wall())
        insist(
            lambda: self.tracker.record(stamped),
            patience=self.patience,
            tell=self.tell,
            pause=self.pause,
            clock=self.clock,
        )
