"""Heartbeats of teachers: a thread of each says that its process runs; `pool/heartbeats.py` finds
the silent.

A process that was stopped, or whose machine is frozen, answers nothing and ends nothing, so Ray
does not miss it. How long a chunk takes says nothing either: a teacher that computes for an hour
goes on beating.
"""

import threading
from collections.abc import Callable
from contextlib import suppress

# heartbeats within the time that the watchdog allows: some may be late, or lost with the
# coordinator's process
BEATS_PER_WATCH = 30.0


def begin_heartbeat(heartbeat: Callable[[], None], *, every_s: float) -> threading.Event:
    """Call `heartbeat` now and then from a thread of its own, until what this returns is set. A
    beat that raises is one that is missing."""

    def go_on() -> None:
        while not ended.is_set():
            with suppress(Exception):
                heartbeat()
            ended.wait(every_s)

    ended = threading.Event()
    threading.Thread(target=go_on, name="heartbeat", daemon=True).start()
    return ended
