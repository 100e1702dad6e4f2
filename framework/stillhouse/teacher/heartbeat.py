"""Heartbeats of teachers: a thread of each says that its process runs, and the pool knows who has fallen silent.

A process that was stopped, or whose machine is frozen, answers nothing and ends nothing, so Ray does not miss it. How long a chunk takes
says nothing either: a teacher that computes for an hour goes on beating.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

BEATS_PER_WATCH = 30.0  # heartbeats within the time that the watchdog allows: some may be late, or lost with the coordinator's process


def begin_heartbeat(heartbeat: Callable[[], None], *, every_s: float) -> threading.Event:
    """Call `heartbeat` now and then from a thread of its own, until what this returns is set. A beat that raises is one that is missing."""

    def go_on() -> None:
        while not ended.is_set():
            with suppress(Exception):
                heartbeat()
            ended.wait(every_s)

    ended = threading.Event()
    threading.Thread(target=go_on, name="heartbeat", daemon=True).start()
    return ended


class Pulses:
    """When each teacher was last heard. One that was never heard is waiting for a place, and is not silent."""

    def __init__(self) -> None:
        self._heard: dict[int, float] = {}  # the longest silent first

    def hear(self, teachers: Iterable[int], now: float) -> None:
        for number in teachers:
            self._heard.pop(number, None)
            self._heard[number] = now

    def forget(self, teacher: int) -> None:
        """It is gone."""
        self._heard.pop(teacher, None)

    def silent(self, now: float, *, longer_than_s: float) -> list[tuple[int, float]]:
        """The teachers that were silent for longer than that, each with its seconds."""
        found = []
        for number, at in self._heard.items():
            if now - at <= longer_than_s:
                break
            found.append((number, now - at))
        return found
