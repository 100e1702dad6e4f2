"""The watch over the head interrupts work soon once the head is gone, whatever the work does, and
not because the head is busy."""

import socket
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest

from stillhouse.cluster.head_process import head_required, is_port_closed, watched_socket
from stillhouse.errors import HeadGoneError, TeacherError

SOON_S = 0.01


def work_on() -> None:
    """Work that takes no error of the program for its end."""
    deadline = monotonic() + 30.0
    while monotonic() < deadline:
        try:
            sleep(0.01)
        except Exception:
            continue


def test_work_is_left_once_the_head_is_gone() -> None:
    with (
        pytest.raises(HeadGoneError, match="the same command goes on from there"),
        head_required(lambda: True, patience_s=0.05, look_every_s=SOON_S),
    ):
        work_on()


def test_a_head_that_comes_back_in_time_ends_nothing() -> None:
    looks = iter([True, True, False])
    over = threading.Event()

    def is_absent() -> bool:
        absent = next(looks, None)
        if absent is None:
            over.set()
        return bool(absent)

    with head_required(is_absent, patience_s=10.0, look_every_s=SOON_S):
        assert over.wait(10.0)


def test_what_fails_while_the_head_is_gone_fails_because_of_that_but_for_our_own_verdicts() -> None:
    with pytest.raises(HeadGoneError), head_required(lambda: True, patience_s=60.0):
        raise ConnectionError("an RPC failed")
    with pytest.raises(TeacherError), head_required(lambda: True, patience_s=60.0):
        raise TeacherError("it failed too often")
    with pytest.raises(ConnectionError), head_required(lambda: False, patience_s=60.0):
        raise ConnectionError("something else")


def test_a_process_that_is_busy_is_there_and_one_that_ended_is_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:  # it accepts no connection
        host, port = head.getsockname()
        assert not is_port_closed(host, port)
    assert is_port_closed(host, port)
    raylet = socket.socket(socket.AF_UNIX)
    with raylet:
        raylet.bind(str(tmp_path / "raylet"))
        raylet.listen()
        with watched_socket(tmp_path / "raylet") as is_gone:
            assert not is_gone()
            raylet.close()
            assert is_gone()
