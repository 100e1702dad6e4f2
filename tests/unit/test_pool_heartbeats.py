"""A worker whose heartbeats have stopped is silent; one that has given none yet is not."""

from stillhouse.pool.heartbeats import Heartbeats


def test_only_a_worker_whose_heartbeats_have_stopped_is_silent() -> None:
    heartbeats = Heartbeats()
    heartbeats.hear([1, 2, 3], now=10.0)
    heartbeats.hear([1], now=50.0)
    heartbeats.forget(3)
    assert heartbeats.silent(70.0, longer_than_s=60.0) == []
    assert heartbeats.silent(71.0, longer_than_s=60.0) == [(2, 61.0)]
    assert heartbeats.silent(111.0, longer_than_s=60.0) == [(2, 101.0), (1, 61.0)]
