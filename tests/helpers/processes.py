"""The processes that this test session's own cluster started, and nobody else's."""

from contextlib import suppress

import psutil


def youngest(title: str) -> psutil.Process:
    """The youngest worker of this session whose title begins so, such as 'ray::Coordinator'."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "".join(process.cmdline()[:1]).startswith(title):
                found.append((process.create_time(), process.pid, process))
    assert found, f"no process of this session is titled {title}"
    return max(found)[-1]


def kill_one(title: str) -> None:
    """SIGKILL the youngest of them."""
    youngest(title).kill()
