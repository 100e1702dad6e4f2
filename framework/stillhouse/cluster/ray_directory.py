"""Ray's files on this machine: directories that no other user can enter, and the address of the
cluster that this machine belongs to.

Ray opens its own temporary directory to all users (mode 0777): another user could move its sockets
and logs, and could name another cluster there, to which the next driver would send its token. So
Ray's directory is inside one of ours with mode 0700, and an address that Ray wrote elsewhere is
trusted only where no other user can have written it.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, sleep

from stillhouse.errors import ConfigError

# where `ray start` writes down the cluster's address, in its temporary directory
_CURRENT = "ray_current_cluster"
# the name of Ray's temporary directory: short, because a socket's path has at most 107 bytes
_RAY = "ray"
_LONGEST_BASE = 18
_MOST_BYTES = 300  # of an address
_REMOVE_S, _AGAIN_S = 5.0, 0.2


def base_directory(environment: Mapping[str, str]) -> Path:
    """The parent of the directories for Ray: RAY_TMPDIR, or /tmp. Not TMPDIR, which often differs
    between two shells of one machine."""
    base = environment.get("RAY_TMPDIR") or "/tmp"
    if len(base) > _LONGEST_BASE:
        raise ConfigError(
            f"RAY_TMPDIR is {base!r}: the sockets that Ray makes below it have too long a path; "
            f"{_LONGEST_BASE} letters fit"
        )
    return Path(base)


def new_directory(base: Path) -> Path:
    """A new directory with a random name, mode 0700. Raises ConfigError where it cannot be made
    safely."""
    _require_safe_parents(base / "new")
    try:
        return Path(tempfile.mkdtemp(prefix="stillhouse-", dir=base))
    except OSError as error:
        raise ConfigError(
            f"cannot make a directory for Ray in {base}: {error.strerror}; set RAY_TMPDIR to one "
            "that you may write"
        ) from None


def remove_directory(directory: Path) -> None:
    """Remove the directory of a cluster that has ended. Tries for some seconds, since its last
    processes may still write there."""
    deadline = monotonic() + _REMOVE_S
    while directory.exists() and monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        sleep(0.0 if not directory.exists() else _AGAIN_S)


def machine_directory(base: Path) -> Path:
    """The one directory of this user on this machine, made where it is missing. Raises ConfigError
    where other users can enter it."""
    directory = _machine_directory(base)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(
            f"cannot make {directory}: {error.strerror}; set RAY_TMPDIR to a directory that you "
            "may write"
        ) from None
    _require_private(directory)
    return directory


def ray_directory(directory: Path) -> Path:
    """Ray's temporary directory within one of ours."""
    return directory / _RAY


def current_address(base: Path) -> str | None:
    """The address (host:port) of the cluster that this machine belongs to, as `stillhouse node` or
    Ray wrote it; None where neither did.

    Raises ConfigError where another user can have written it.
    """
    directory = _machine_directory(base)
    if directory.is_symlink() or directory.exists():
        _require_private(directory)
        address = _read_address(directory / _RAY / _CURRENT)
        if address is not None:
            return address
    # written by a `ray start` that is not ours: KubeRay, in its containers
    return _read_address(base / _RAY / _CURRENT)


def _machine_directory(base: Path) -> Path:
    return base / f"stillhouse-{os.geteuid()}"


def _require_private(directory: Path) -> None:
    found = directory.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"{directory} is not a directory of your own that nobody else may enter "
            f"({_shown(found)}); mode 0700 is wanted. Find out who made it and remove it, or set "
            "RAY_TMPDIR to a directory that is yours alone"
        )
    _require_safe_parents(directory)


def _require_safe_parents(path: Path) -> None:
    """Raise ConfigError where another user can replace the path, by the rights on a directory above
    it."""
    trusted = {os.geteuid(), 0, os.stat("/").st_uid}
    place = path.absolute().parent.resolve()
    for parent in (place, *place.parents):
        try:
            found = parent.stat()
        except OSError as error:
            raise ConfigError(
                f"{parent} cannot hold Ray's files: {error.strerror}; set RAY_TMPDIR to a "
                "directory that you may write"
            ) from None
        is_open = stat.S_IMODE(found.st_mode) & 0o022 and not found.st_mode & stat.S_ISVTX
        if found.st_uid not in trusted or is_open:
            raise ConfigError(
                f"others can replace what lies in {parent} ({_shown(found)}), so it is no place "
                "for Ray's files; set RAY_TMPDIR to a directory that is yours alone"
            )


def _read_address(path: Path) -> str | None:
    """The address in a file that only this user can have written; None where there is no such
    file."""
    # neither a link nor a named pipe is followed
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _not_trusted(path, error.strerror or "it cannot be opened") from None
    with os.fdopen(descriptor, "rb") as file:
        # its owner, and that of its directory; its kind and mode
        found = os.fstat(descriptor)
        for each in (found, path.parent.lstat()):
            if each.st_uid != os.geteuid():
                raise _not_trusted(path, _shown(each))
        is_plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if not is_plain or stat.S_IMODE(found.st_mode) & 0o022:
            raise _not_trusted(path, _shown(found))
        text = file.read(_MOST_BYTES).decode(errors="replace").strip()
    # its form
    host, colon, port = text.rpartition(":")
    if not host or not colon or not port.isdecimal() or not text.isprintable() or " " in text:
        raise _not_trusted(path, "it holds no host:port")
    return text


def _not_trusted(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} is to name this machine's cluster, but may be another user's work ({reason}); a "
        "token is not sent there. Start the cluster with `stillhouse node head`, or say where it "
        'is: cluster.address = "host:port"'
    )


def _shown(found: os.stat_result) -> str:
    return f"user {found.st_uid}, mode {stat.filemode(found.st_mode)}"
