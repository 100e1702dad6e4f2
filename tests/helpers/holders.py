"""Processes that hold a run directory and its checkpoints until they are killed, as a command
does."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import time
from typing import Any

from stillhouse.pipeline.holder import Holder
from stillhouse.pipeline.ownership import locked, owned

_PATIENCE_S = 60


@contextmanager
def holding(run_dir: Path, url: str) -> Iterator[Any]:
    """A process that holds both; it is killed with SIGKILL at the end of the block, if it still
    lives."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["helpers.mortals", __name__])
    ours, theirs = forks.Pipe()
    process = forks.Process(target=_hold, args=(run_dir, url, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(_PATIENCE_S), "it holds nothing"
        assert ours.recv() == "held"
        yield process
    finally:
        kill(process)


def kill(process: Any) -> None:
    """SIGKILL, and wait until it is gone."""
    process.kill()
    process.join(_PATIENCE_S)
    assert not process.is_alive()


def _hold(run_dir: Path, url: str, connection: Connection) -> None:
    holder = Holder.here("stillhouse run first.toml", run_dir, now=time())
    with locked(holder), owned(url, holder, say=print):
        connection.send("held")
        connection.recv()
