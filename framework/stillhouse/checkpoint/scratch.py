"""Temporary folders for whole checkpoints and for swapped states. They are too large to stay: one
that a killed process left behind is deleted when the next one is made."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _IN_USE = "stillhouse-checkpoint-", "in-use"


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder of this process's own, in `parent` (None: TMPDIR), while the block lasts. A lock on
    a file in it marks it as in use; the system releases the lock when the process ends."""
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for left in parent.glob(f"{_PREFIX}*/{_IN_USE}"):
        with suppress(OSError), left.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(
            prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True
        ) as folder,
        Path(folder, "new").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(folder, "new").rename(Path(folder, _IN_USE))  # no other process finds it unlocked
        yield Path(folder)
