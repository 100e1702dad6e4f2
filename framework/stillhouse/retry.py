"""Retry: waiting for a store that is unavailable, with a report after a while and an end."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TypeVar

from stillhouse.errors import StoreUnavailable

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

Tell = Callable[[float, str], None]  # (seconds that the outage has lasted, the store's error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for an unavailable store, counted from the first request that failed."""

    request_s: float = 30.0  # for which one request is tried again before it fails; see Blobs
    tell_after_s: float = 60.0
    end_after_s: float = 1800.0
    first_pause_s: float = 0.5  # between two tries; each pause is twice as long as the one before
    last_pause_s: float = 30.0


DEFAULT_PATIENCE = Patience()


class Outage:
    """For how long a store has been unavailable to one caller. Not thread-safe."""

    def __init__(
        self, patience: Patience, *, tell: Tell, clock: Callable[[], float] = monotonic
    ) -> None:
        self._patience, self._tell, self._clock = patience, tell, clock
        self._since: float | None = None
        self._told = False

    def goes_on(self, error: StoreUnavailable) -> None:
        """Record that a try failed. Raises StoreUnavailable once the outage has lasted for
        `end_after_s`."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        lasted_s = now - self._since
        _log.info("the store has been unavailable for %.1f s: %s", lasted_s, error)
        if lasted_s >= self._patience.end_after_s:
            raise given_up(error, self._patience.end_after_s) from error
        if lasted_s >= self._patience.tell_after_s and not self._told:
            self._told = True
            self._tell(lasted_s, str(error))

    def is_over(self) -> None:
        """Record that the store has answered."""
        if self._since is not None:
            _log.info("the store answers again, after %.1f s", self._clock() - self._since)
        self._since, self._told = None, False


def pauses(first_s: float, *, last_s: float) -> Iterator[float]:
    """Exponential backoff: the seconds to wait before each next try, doubled each time up to
    `last_s`, without an end."""
    while True:
        yield first_s
        first_s = min(2 * first_s, last_s)


def given_up(error: StoreUnavailable, waited_s: float) -> StoreUnavailable:
    """The error to raise at the end of a wait."""
    return StoreUnavailable(
        f"{error}; after {waited_s:.0f} s of waiting it is given up. Everything that was published "
        "or committed stays: mend the cause and run again to go on from there"
    )


def insist(
    call: Callable[[], _Answer],
    *,
    patience: Patience,
    tell: Tell,
    pause: Callable[[float], None] = sleep,
    clock: Callable[[], float] = monotonic,
) -> _Answer:
    """What `call` returns, which is repeated while the store is unavailable.

    Raises StoreUnavailable at the end of the patience, and any other error at once.
    """
    outage = Outage(patience, tell=tell, clock=clock)
    pauses_s = pauses(patience.first_pause_s, last_s=patience.last_pause_s)
    while True:
        try:
            answer = call()
            outage.is_over()
            return answer
        except StoreUnavailable as error:
            outage.goes_on(error)
        pause(next(pauses_s))
