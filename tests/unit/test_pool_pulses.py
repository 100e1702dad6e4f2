"""A worker that was heard and then no more is silent; one that was never heard is not."""

from stillhouse.pool.pulses import Pulses


def test_only_who_was_heard_once_and_then_no_more_is_silent() -> None:
    pulses = Pulses()
    pulses.hear([1, 2, 3], now=10.0)
    pulses.hear([1], now=50.0)
    pulses.forget(3)
    assert pulses.silent(70.0, longer_than_s=60.0) == []
    assert pulses.silent(71.0, longer_than_s=60.0) == [(2, 61.0)]
    assert pulses.silent(111.0, longer_than_s=60.0) == [(2, 101.0), (1, 61.0)]
