"""Heartbeats of workers: a thread of each says that its process runs, and the pool finds those that
have been silent for too long.

Ray does not notice a process that is stopped, or whose machine is frozen: it neither answers nor
ends. The time that a block takes is no sign either: a worker that computes for an hour has
heartbeats all the while.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

# Heartbeats in the time that the watchdog allows: some may be late, or lost with the coordinator's
# process.
BEATS_PER_WATCH = 30.0


class Heartbeats:
    """When each worker was last heard. One that was never heard waits for a free machine, and is
    not silent."""

    def __init__(self) -> None:
        self._heard: dict[int, float] = {}  # in the order of their last heartbeats

    def hear(self, workers: Iterable[int], now: float) -> None:
        for number in workers:
            self._heard.pop(number, None)
            self._heard[number] = now

    def forget(self, worker: int) -> None:
        self._heard.pop(worker, None)

    def silent(self, now: float, *, longer_than_s: float) -> list[tuple[int, float]]:
        """The workers without a heartbeat for longer than that, each with its seconds of silence;
        the longest first."""
        return [
            (number, now - at) for number, at in self._heard.items() if now - at > longer_than_s
        ]


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
