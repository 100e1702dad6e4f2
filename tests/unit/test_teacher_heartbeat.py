"""A teacher that computes beats on, whatever holds its interpreter."""

import threading
from time import monotonic

import torch

from stillhouse.pool.heartbeats import BEATS_PER_WATCH, begin_heartbeat

WATCHDOG_S = 1.5


def compute(seconds: float) -> None:
    """What a forward pass is to other threads: kernels, which let them run, and Python between,
    which does not give way by itself."""
    matrix_NN = torch.randn(512, 512)
    end = monotonic() + seconds
    while monotonic() < end:
        matrix_NN = torch.tanh(matrix_NN @ matrix_NN)
        sorted(range(200_000, 0, -1))


def test_a_process_that_computes_without_a_pause_is_never_silent_for_the_watchdogs_time() -> None:
    heartbeats = [monotonic()]
    ended = begin_heartbeat(
        lambda: heartbeats.append(monotonic()), every_s=WATCHDOG_S / BEATS_PER_WATCH
    )
    compute(2 * WATCHDOG_S)
    ended.set()
    gaps_s = [
        later - earlier
        for earlier, later in zip(heartbeats, [*heartbeats[1:], monotonic()], strict=True)
    ]
    assert max(gaps_s) < WATCHDOG_S
    assert len(heartbeats) > BEATS_PER_WATCH / 2


def test_a_heartbeat_that_fails_is_followed_by_others() -> None:
    heartbeats = threading.Semaphore(0)

    def fail() -> None:
        heartbeats.release()
        raise ConnectionError("the coordinator is away")

    ended = begin_heartbeat(fail, every_s=0.01)
    assert all(heartbeats.acquire(timeout=30) for _ in range(3))
    ended.set()
