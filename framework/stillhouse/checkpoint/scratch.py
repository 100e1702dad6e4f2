"""Temporary folders for whole checkpoints. They are too large to stay: one that a killed process
left behind is deleted when the next one is made."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _IN_USE = "stillhouse-checkpoint-", "in-use"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this process's own, in TMPDIR, while the block lasts. A lock on a file in it
    marks it as in use; the system releases the lock when the process ends."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_IN_USE}"):
        with suppress(OSError), left.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as folder,
        Path(folder, _IN_USE).open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)
