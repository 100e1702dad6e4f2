"""A worker that was heard and then no more is silent; one that was never heard is not."""

from stillhouse.pool.heartbeats import Heartbeats


def test_only_who_was_heard_once_and_then_no_more_is_silent() -> None:
    heartbeats = Heartbeats()
    heartbeats.hear([1, 2, 3], now=10.0)
    heartbeats.hear([1], now=50.0)
    heartbeats.forget(3)
    assert heartbeats.silent(70.0, longer_than_s=60.0) == []
    assert heartbeats.silent(71.0, longer_than_s=60.0) == [(2, 61.0)]
    assert heartbeats.silent(111.0, longer_than_s=60.0) == [(2, 101.0), (1, 61.0)]
