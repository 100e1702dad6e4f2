"""Starting Ray on one machine, as a cluster's head or as a node of it, always with token
authentication.

With the token, a process may run code on every machine of the cluster; without it, none can
connect. Ray itself would start without a token, open to all who reach its ports.
"""

import json
import secrets
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep

from stillhouse import atomic
from stillhouse.cluster.ray_directory import current_address, ray_directory
from stillhouse.errors import ConfigError, RunError

PORT = 6379
TOKEN_FILE = Path("~/.ray/auth_token")  # where Ray looks for it
# of Ray's object store, for work items and answers; its default is 30 % of the machine's memory
OBJECT_STORE_BYTES = 256 << 20
_LEAST_LENGTH = 16
_LOOK_EVERY_S, _CONNECT_S = 2.0, 5.0


def make_token(path: Path) -> None:
    """Write a new token that only its owner can read (mode 0600). Raises ConfigError where there is
    one already, or none can be written."""
    try:
        atomic.make_directory(path.parent, mode=0o700)
        created = atomic.create(path, secrets.token_hex(32).encode(), mode=0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; set RAY_AUTH_TOKEN_PATH to a file of your own"
        ) from None
    if not created:
        raise ConfigError(
            f"{path} exists already and stays as it is; a cluster's machines share one token"
        )


def protected(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with Ray's authentication on. Raises ConfigError where there is no token, or
    others may read it."""
    token, path = environment.get("RAY_AUTH_TOKEN"), environment.get("RAY_AUTH_TOKEN_PATH")
    require_unguessable(_read(Path(path or TOKEN_FILE).expanduser()) if token is None else token)
    return {**environment, "RAY_AUTH_MODE": "token"}


def require_unguessable(token: str) -> None:
    """Raise ConfigError where a cluster's token is short or blank."""
    length = len(token.strip())  # as Ray reads it
    if length < _LEAST_LENGTH:
        raise ConfigError(
            f"the token of the cluster has {length} characters; at least {_LEAST_LENGTH}, which "
            "nobody can guess, are wanted. Unset RAY_AUTH_TOKEN, or give it what `openssl rand "
            "-hex 32` makes"
        )


def start(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run `ray start`; blocks where the command has --block. Raises ConfigError without a token,
    RunError where Ray does not start."""
    if subprocess.run(command, env=protected(environment), check=False).returncode != 0:
        raise RunError("Ray did not start here; its messages are above")


def head(
    *,
    port: int,
    resources: Mapping[str, float],
    autoscaling: Path | None,
    block: bool,
    directory: Path,
) -> list[str]:
    """The command that makes this machine a head, with Ray's files in `directory`. Its dashboard
    listens on loopback."""
    command = [
        *_ray_start(resources, block=block, directory=directory),
        "--head",
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
    ]
    if autoscaling is not None:
        command.append(f"--autoscaling-config={autoscaling.expanduser()}")
    return command


def join(
    address: str, *, resources: Mapping[str, float], block: bool, directory: Path
) -> list[str]:
    """The command that makes this machine a node of the head at HOST or HOST:PORT, with Ray's files
    in `directory`."""
    host, port = _host_and_port(address)
    return [
        *_ray_start(resources, block=block, directory=directory),
        f"--address={host}:{port}",
    ]


def wait_for_head(address: str, *, patience_s: float, waiting: Callable[[str], None]) -> None:
    """Return once the head's port is open. `waiting` is called with the reason after each failed
    try; raises RunError after `patience_s`."""
    deadline = monotonic() + patience_s
    while True:
        try:
            with socket.create_connection(_host_and_port(address), timeout=_CONNECT_S):
                return
        except OSError as error:
            if monotonic() > deadline:
                raise RunError(
                    f"nobody listens at {address} after {patience_s:g} s ({error}); is the head "
                    "up, and its port open?"
                ) from None
            waiting(f"waiting for the head at {address}: {error}")
        sleep(_LOOK_EVERY_S)


def require_health(base: Path) -> None:
    """Raise RunError where this machine belongs to a cluster whose head does not answer. A machine
    that belongs to none is healthy."""
    address = current_address(base)
    if address is None:
        return
    try:
        socket.create_connection(_host_and_port(address), timeout=_CONNECT_S).close()
    except OSError as error:
        raise RunError(f"the head at {address} does not answer ({error})") from None


def parse_resources(words: Sequence[str]) -> dict[str, float]:
    """`teacher=8` as a resource of that amount. Raises ConfigError."""
    found: dict[str, float] = {}
    for word in words:
        name, _, amount = word.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            raise ConfigError(
                f"--resources {word!r} is not NAME=AMOUNT, such as teacher=8"
            ) from None
    return found


def _read(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        token = path.read_text().strip()
    except OSError:
        raise ConfigError(
            f"there is no token for the cluster: RAY_AUTH_TOKEN is not set, and {path} cannot be "
            "read. Without one, all who reach this machine could run code on it. `stillhouse node "
            "token` makes one; every machine of the cluster needs the same"
        ) from None
    if mode & 0o077:
        raise ConfigError(
            f"{path} may be read by others (its mode is {mode:o}); chmod 600 {path}, and make a "
            "new one if they did"
        )
    return token


def _ray_start(resources: Mapping[str, float], *, block: bool, directory: Path) -> list[str]:
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--disable-usage-stats",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={ray_directory(directory)}",
    ]
    command += [f"--resources={json.dumps(dict(resources))}"] if resources else []
    return [*command, "--block"] if block else command


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    return (host, int(port)) if colon and port.isdecimal() else (address, PORT)
