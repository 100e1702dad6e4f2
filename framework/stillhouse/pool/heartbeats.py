"""Heartbeats of workers, as a pool takes them in: which workers have been silent for too long."""

from collections.abc import Iterable


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
