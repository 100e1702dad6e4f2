"""Which workers have fallen silent: the pool's side of their heartbeats."""

from collections.abc import Iterable


class Pulses:
    """When each worker was last heard. One that was never heard is waiting for a place, and is not
    silent."""

    def __init__(self) -> None:
        self._heard: dict[int, float] = {}  # in the order of their last heartbeats

    def hear(self, workers: Iterable[int], now: float) -> None:
        for number in workers:
            self._heard.pop(number, None)
            self._heard[number] = now

    def forget(self, worker: int) -> None:
        """It is gone."""
        self._heard.pop(worker, None)

    def silent(self, now: float, *, longer_than_s: float) -> list[tuple[int, float]]:
        """The workers that were silent for longer than that, each with its seconds, the longest
        silent first."""
        return [
            (number, now - at) for number, at in self._heard.items() if now - at > longer_than_s
        ]
