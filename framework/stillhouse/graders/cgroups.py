"""Control groups: a limit on the processes and the memory of one run, where this process may make
such a group. Versions 1 and 2 of the kernel's interface."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from time import monotonic, sleep

ROOT = Path("/sys/fs/cgroup")

_FILES = {  # of a limit, by controller; version 1, then version 2
    "pids": ("pids.max", "pids.max"),
    "memory": ("memory.limit_in_bytes", "memory.max"),
}
_END_S, _PAUSE_S = 5.0, 0.01
_numbers = count()


@contextmanager
def groups_of_one_run(
    *, num_tasks: int, memory_bytes: int, name: str, root: Path
) -> Iterator[list[Path]]:
    """The directories of new groups with these limits, into which a process writes its number, and
    which are removed at the end. Empty where none can be made, as in most containers."""
    limits, made = {"pids": num_tasks, "memory": memory_bytes}, list[Path]()
    try:
        own = f"stillhouse-{name}-{next(_numbers)}"
        if (root / "cgroup.controllers").is_file():  # version 2: one group
            with suppress(OSError):
                if {*limits} <= {*(root / "cgroup.subtree_control").read_text().split()}:
                    made += [_made(root / own, {_FILES[key][1]: limits[key] for key in limits})]
        else:
            for controller, limit in limits.items():
                with suppress(OSError):
                    if (root / controller).is_dir():
                        file = _FILES[controller][0]
                        made += [_made(root / controller / own, {file: limit})]
        yield made
    finally:
        for path in made:
            _remove(path)


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
