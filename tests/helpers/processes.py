"""The processes that this test session's own cluster started, and nobody else's."""

import signal
from contextlib import suppress

import psutil


def kill_one(title: str) -> None:
    """SIGKILL one worker of this session whose title begins so, such as 'ray::_Board'. There is one."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "".join(process.cmdline()[:1]).startswith(title):
                process.send_signal(signal.SIGKILL)
                return
    raise AssertionError(f"no process of this session is titled {title}")
