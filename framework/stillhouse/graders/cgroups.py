"""Control groups: a limit on the processes and the memory of one run, where this process may make
such a group. Versions 1 and 2 of the kernel's interface."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

ROOT = Path("/sys/fs/cgroup")

_PREFIX = "stillhouse-run-"
_END_S, _PAUSE_S = 5.0, 0.01
_LEFT_S = 600.0


@contextmanager
def groups_of_one_run(*, num_tasks: int, memory_bytes: int, root: Path) -> Iterator[list[Path]]:
    """The directories of new groups with these limits, into which a process writes its number, and
    which are removed at the end. Empty where none can be made, as in most containers."""
    made = list[Path]()
    try:
        for path, limits in _wanted(root, num_tasks=num_tasks, memory_bytes=memory_bytes):
            with suppress(OSError):
                made.append(_made(path, limits))
        yield made
    finally:
        for path in made:
            _remove(path)


def remove_left_groups(root: Path, *, now: float) -> None:
    """Remove groups of killed processes, at `now` in seconds since 1970: empty ones of an age at
    which no run is about to enter its own."""
    for path in (*root.glob(f"{_PREFIX}*"), *root.glob(f"*/{_PREFIX}*")):
        with suppress(OSError):  # one that is not empty is busy
            if path.stat().st_mtime < now - _LEFT_S:
                path.rmdir()


def _wanted(root: Path, *, num_tasks: int, memory_bytes: int) -> list[tuple[Path, dict[str, int]]]:
    """Groups to make, each with its files: one of version 2 with both limits where the root allows
    its groups to have them, or one of version 1 a limit."""
    own = f"{_PREFIX}{secrets.token_hex(8)}"
    allowed = root / "cgroup.subtree_control"
    if allowed.is_file():
        both = {"pids.max": num_tasks, "memory.max": memory_bytes}
        return [(root / own, both)] if {"memory", "pids"} <= {*allowed.read_text().split()} else []
    return [
        (root / "pids" / own, {"pids.max": num_tasks}),
        (root / "memory" / own, {"memory.limit_in_bytes": memory_bytes}),
    ]


def _made(path: Path, limits: dict[str, int]) -> Path:
    path.mkdir()
    try:
        for file, limit in limits.items():
            (path / file).write_text(f"{limit}\n")
    except OSError:
        path.rmdir()
        raise
    return path


def _remove(path: Path) -> None:
    """It is busy until the last of its processes, which were killed, has ended."""
    end = monotonic() + _END_S
    while path.exists() and monotonic() < end:
        with suppress(OSError):
            path.rmdir()
            return
        sleep(_PAUSE_S)
