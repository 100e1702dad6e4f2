"""A Ctrl-C is never lost, whoever catches it on its way, and only where it means one."""

import signal
from contextlib import suppress

import pytest

from stillhouse.interrupts import kept_interrupts


def test_a_ctrl_c_that_somebody_caught_is_raised_again_by_who_asks() -> None:
    with kept_interrupts() as require_none:
        require_none()
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            require_none()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ctrl_c_is_raised_at_once() -> None:
    with kept_interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_where_ctrl_c_is_ignored_it_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with kept_interrupts() as require_none:
            signal.raise_signal(signal.SIGINT)
            require_none()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
