"""The processes that this test session's own cluster started, and nobody else's."""

import signal
from contextlib import suppress

import psutil


def kill_one(title: str) -> None:
    """SIGKILL the youngest worker of this session whose title begins so, such as 'ray::Coordinator'."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "".join(process.cmdline()[:1]).startswith(title):
                found.append((process.create_time(), process.pid, process))
    assert found, f"no process of this session is titled {title}"
    max(found)[-1].send_signal(signal.SIGKILL)
