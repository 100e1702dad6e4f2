"""A tracker that waits while the journal's disk is full, and then records the event."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic, sleep, time

from stillhouse.retry import Patience, Tell, insist
from stillhouse.tracking.events import RunEvent, Tracker

# A run stands still while its journal waits, so the user is told soon. Tries at a local disk are
# cheap, so they are frequent.
ROOM_PATIENCE = Patience(tell_after_s=3.0, last_pause_s=2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientTracker:
    """Records events with another tracker, and tries again while that one has no room.

    The caller waits meanwhile, so events stay in order. `record` raises StoreUnavailable at the end
    of the patience, and any other error at once. `tell` shows the user that the run waits, which
    the journal cannot record.
    """

    tracker: Tracker
    tell: Tell
    patience: Patience = ROOM_PATIENCE
    pause: Callable[[float], None] = sleep
    clock: Callable[[], float] = monotonic
    wall: Callable[[], float] = time

    def record(self, event: RunEvent) -> None:
        # the time at which it happened, not at which there was room
        stamped = event if event.time else replace(event, time=self.wall())
        insist(
            lambda: self.tracker.record(stamped),
            patience=self.patience,
            tell=self.tell,
            pause=self.pause,
            clock=self.clock,
        )
