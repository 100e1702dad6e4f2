"""Heartbeats of teachers: a thread of each says that its process runs; `pool/heartbeats.py` finds
the silent.

Ray does not notice a process that is stopped, or whose machine is frozen: it neither answers nor
ends. The time that a chunk takes is no sign either: a teacher that computes for an hour has
heartbeats all the while.
"""

import threading
from collections.abc import Callable
from contextlib import suppress

# Heartbeats in the time that the watchdog allows: some may be late, or lost with the coordinator's
# process.
BEATS_PER_WATCH = 30.0


def begin_heartbeat(heartbeat: Callable[[], None], *, every_s: float) -> threading.Event:
    """Call `heartbeat` every `every_s` seconds from a thread, until the returned event is set.

    A call that raises is a missing heartbeat, and nothing else.
    """

    def beat() -> None:
        while not ended.is_set():
            with suppress(Exception):
                heartbeat()
            ended.wait(every_s)

    ended = threading.Event()
    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    return ended
