"""A group of ranks as the coordinator sees it: its heartbeats, its stop request, and how its
attempts ended."""

from collections.abc import Callable
from dataclasses import replace

from stillhouse.cluster.heartbeat import Cause, Heard, Heartbeat, PreviousAttempt, StopRequest


class RankGroup:
    """One group of ranks, from attempt to attempt. `clock` gives seconds, and never goes back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heartbeats: dict[int, tuple[Heartbeat, float]] = {}  # by rank, with when it came
        self._stop_request: tuple[StopRequest, float] | None = None  # with its deadline
        self._reason: tuple[Cause, str] | None = None  # why this attempt ends
        self._last_step: tuple[int, float] = (0, clock())  # with when it was taken
        self._begun_from: int | None = None
        self._num_failures = 0

    def begin(self, committed_step: int) -> PreviousAttempt | None:
        """An attempt begins from this commit. None where it is the first one."""
        # the end of the attempt before; its heartbeats and a request to come back go with it
        before, self._begun_from = self._begun_from, committed_step
        cause, detail = self._reason or ("died", "a rank was killed, or its machine")
        self._reason = None
        self._heartbeats.clear()
        if self._stop_request is not None and self._stop_request[0].cause != "stop":
            self._stop_request = None
        if before is None:
            self.stepped(committed_step)
            return None
        # failures in a row
        if committed_step > before or cause in ("notice", "grown"):
            self._num_failures = 0
        self._num_failures += cause in ("died", "stalled")
        last_step, at = self._last_step
        return PreviousAttempt(cause, detail, last_step, self._clock() - at, self._num_failures)

    def stepped(self, step: int) -> None:
        self._last_step = (step, self._clock())

    def receive(self, heartbeat: Heartbeat) -> None:
        self._heartbeats[heartbeat.rank] = (heartbeat, self._clock())

    def heard(self) -> list[Heard]:
        """The last heartbeat of each rank."""
        now = self._clock()
        return [Heard(heartbeat, now - at) for heartbeat, at in self._heartbeats.values()]

    def forget(self, rank: int | None) -> None:
        """Drop a rank's heartbeat, or that of all."""
        for each in [*self._heartbeats] if rank is None else [rank]:
            self._heartbeats.pop(each, None)

    def request_stop(self, request: StopRequest) -> None:
        self._stop_request = (request, self._clock() + request.seconds_left)

    def stop_request(self) -> StopRequest | None:
        if self._stop_request is None:
            return None
        request, deadline = self._stop_request
        return replace(request, seconds_left=deadline - self._clock())

    def explain(self, cause: Cause, detail: str) -> None:
        """Why the attempt ends. The first reason stands: ranks that fail because another did have
        nothing to add. But a rank that stands still is why its peers timed out, even where it is
        found later than they are."""
        if self._reason is None or (cause == "stalled" and self._reason[0] == "died"):
            self._reason = cause, detail

    @property
    def exit_reason(self) -> Cause | None:
        """Why the group left on a stop request; None where it did not."""
        cause = self._reason[0] if self._reason is not None else None
        return cause if cause in ("notice", "grown", "stop") else None
