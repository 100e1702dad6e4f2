"""Preflight checks of this machine before a command, or a Ray cluster, starts on it: open files,
loopback, directories to write, shared memory.

Each check returns one sentence for each thing that is missing: what was found, what is wanted and
what to do. All of them together take milliseconds, so they come before the libraries that take
seconds to import, and before Ray, which would hang or fail with stack traces. A check tries the
operation instead of reading permissions: a read-only file system refuses root, too.
"""

import os
import resource
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from stillhouse.cluster.ray_directory import base_directory, new_directory
from stillhouse.errors import ConfigError

# Ray's raylet was seen with 53 open files and 3 more for each worker process, its coordinator (GCS)
# with 56 and 2 more, a rank with 73.
_LEAST_OPEN_FILES, _OPEN_FILES_PER_CPU = 128, 4
_MOST_OPEN_FILES = 65536  # to which Ray raises the limit of its drivers
_LOOPBACK, _CONNECT_S = "127.0.0.1", 1.0
_SHARED_MEMORY = "/dev/shm"


def require(missing: Sequence[str]) -> None:
    """Raise ConfigError with the sentences of the checks, if there are any."""
    if missing:
        raise ConfigError(
            "this machine cannot do it:\n" + "\n".join(f"  - {each}" for each in missing)
        )


def for_any_command(*, cache: Path) -> list[str]:
    """The checks for reading a config's models and corpus: cache and temporary directory."""
    return [*_cache_directory(cache), *_temporary_directory()]


def for_ray(environment: Mapping[str, str], *, num_cpus: int | None) -> list[str]:
    """The checks for a cluster that is started on this machine, with so many CPUs or all (None)."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        *open_files(limits=limits, num_cpus=num_cpus or os.cpu_count() or 1),
        *_loopback(),
        *_ray_directory(environment),
    ]


def home() -> list[str]:
    """The check for a home directory, which Ray Train looks for when it is imported. It may be
    read-only."""
    try:
        Path.home()
    except RuntimeError:
        return [
            f"no home directory is known: HOME is not set, and user {os.geteuid()} has no "
            "account; set HOME to a directory"
        ]
    return []


def open_files(*, limits: tuple[int, int], num_cpus: int) -> list[str]:
    """The check for open files. `limits`: the soft limit, which is raised where it is too low, and
    the hard one."""
    wanted, (_, hard) = _LEAST_OPEN_FILES + _OPEN_FILES_PER_CPU * num_cpus, limits
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return []
    return [
        f"a process here may open {hard:,} files, by its hard limit; Ray on {num_cpus:,} CPUs "
        f"wants {wanted:,} at least. Raise the limit (as root: `ulimit -n 65536`; of a container: "
        "--ulimit nofile=65536)"
    ]


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one, for all that this process starts. Ray
    itself does so for its drivers alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def remarks(environment: Mapping[str, str], *, object_store_bytes: int) -> list[str]:
    """The checks whose results stop no run: shared memory, another temporary directory."""
    return [
        *shared_memory(num_free_bytes=_free_shared_memory(), wanted_bytes=object_store_bytes),
        *_other_temporary_directory(environment),
    ]


def shared_memory(*, num_free_bytes: int, wanted_bytes: int) -> list[str]:
    """The check for /dev/shm. Where it is too small, Ray's object store goes to disk, and ranks on
    several GPUs may find no room for NCCL's buffers."""
    if num_free_bytes >= wanted_bytes:
        return []
    return [
        f"{_SHARED_MEMORY} has {num_free_bytes:,} bytes free; Ray's object store, which takes "
        f"{wanted_bytes:,}, goes to disk instead. Ranks on several GPUs need room there, too "
        "(NCCL): give a container --shm-size=1g or more"
    ]


def why_not_writable(directory: Path) -> str | None:
    """Why nothing can be written into a directory, or it cannot be made where it is missing; None
    where it can. Nothing is left there."""
    there = _existing(directory)
    if there == directory and not there.is_dir():
        return f"{there} is a file"
    if not there.is_dir():
        return f"{there} is a file, so {directory} cannot be a directory"
    if (reason := why_too_long(directory)) is not None:
        return reason
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"nothing can be written in {there} ({error.strerror})"


def why_too_long(path: Path) -> str | None:
    """Why a path cannot be made, because of a name in it that is too long; None where none is."""
    most_bytes = os.pathconf(_existing(path), "PC_NAME_MAX")
    if all(len(os.fsencode(part)) <= most_bytes for part in path.parts):
        return None
    return f"a name in {path} is longer than the {most_bytes} bytes that fit there"


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that exists."""
    return next(folder for folder in (directory, *directory.parents) if os.path.exists(folder))


def _cache_directory(cache: Path) -> list[str]:
    reason = why_not_writable(cache)
    if reason is None:
        return []
    return [
        f"the cache of tokenised corpora, {cache}, cannot be used: {reason}; set XDG_CACHE_HOME to "
        "another directory"
    ]


def _temporary_directory() -> list[str]:
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        return [
            f"there is no temporary directory: {error.strerror}; set TMPDIR to a directory that "
            "you may write"
        ]
    return []


def _other_temporary_directory(environment: Mapping[str, str]) -> list[str]:
    named, used = environment.get("TMPDIR"), tempfile.gettempdir()
    if not named or os.path.abspath(named) == used:
        return []
    return [f"TMPDIR is {named}, where nothing can be written; temporary files go to {used}"]


def _loopback() -> list[str]:
    try:
        with (
            socket.create_server((_LOOPBACK, 0)) as server,
            socket.create_connection(server.getsockname(), timeout=_CONNECT_S),
        ):
            return []
    except OSError as error:
        return [
            f"no connection can be made to {_LOOPBACK} ({error}), by which Ray's processes speak; "
            "bring it up: `ip link set lo up`"
        ]


def _ray_directory(environment: Mapping[str, str]) -> list[str]:
    try:
        new_directory(base_directory(environment)).rmdir()
    except ConfigError as error:
        return [str(error)]
    return []


def _free_shared_memory() -> int:
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
