"""Who has no token gets into no cluster of ours, and no machine becomes part of one without."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from shutil import rmtree
from time import monotonic, sleep
from typing import NamedTuple

import psutil
import pytest

from helpers.command import stillhouse
from stillhouse.cluster import node
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection
from stillhouse.errors import ConfigError

TOKEN = "a token that nobody guesses"

HOST = """
import os, sys, ray
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection
with attached(ClusterSection(num_cpus=1)):
    session = ray._private.worker._global_node.get_session_dir_path()
    print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], session, flush=True)
    sys.stdin.read()
"""
STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(lambda: "it is in").remote()))
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 60
    while not condition():
        assert monotonic() < deadline
        sleep(0.05)


def test_no_node_starts_without_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    for command in (["head"], ["join", "192.0.2.1", "--patience", "0"]):
        outcome = stillhouse("node", *command)
        assert outcome.code == 2
        assert "there is no token" in outcome.err
        assert "`stillhouse node token` makes one" in outcome.err


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="may be read by others"):
        node.protected({"RAY_AUTH_TOKEN_PATH": str(path)})
    path.chmod(0o600)
    assert node.protected({"RAY_AUTH_TOKEN_PATH": str(path)})["RAY_AUTH_MODE"] == "token"


def test_a_token_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 6 characters"):
        node.protected({"RAY_AUTH_TOKEN": "secret"})


def test_a_new_token_is_its_owners_alone_and_replaces_none(tmp_path: Path) -> None:
    path = tmp_path / "ray" / "auth_token"
    node.make_token(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    token = path.read_text()
    assert len(token) == 64
    with pytest.raises(ConfigError, match="exists already"):
        node.make_token(path)
    assert path.read_text() == token


def test_a_head_listens_for_its_dashboard_on_loopback_alone() -> None:
    command = node.head(
        port=6379, resources={"student": 8.0}, autoscaling=None, block=False, directory=Path("/a")
    )
    assert "--temp-dir=/a/ray" in command
    assert "--dashboard-host=127.0.0.1" in command
    assert '--resources={"student": 8.0}' in command


def without_token() -> dict[str, str]:
    """The environment of somebody who was never told of any cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}


class OwnCluster(NamedTuple):
    """That a command started on this machine by itself."""

    address: str
    token: str
    session: Path  # Ray's directory
    process: "subprocess.Popen[str]"


@pytest.fixture(scope="module")
def shared_place() -> Iterator[Path]:
    """A directory like /tmp, for everybody; near the root, since the path of a socket is short."""
    place = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    place.chmod(0o1777)
    yield place
    rmtree(place)


@pytest.fixture(scope="module")
def own_cluster(shared_place: Path) -> Iterator[OwnCluster]:
    command, environment = (
        [sys.executable, "-c", HOST],
        without_token() | {"RAY_TMPDIR": str(shared_place)},
    )
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as host:
        assert host.stdout is not None
        address, token, session = host.stdout.readline().split()
        yield OwnCluster(address, token, Path(session), host)
        host.communicate(timeout=60)
    assert list(shared_place.iterdir()) == []  # its files ended with it


def as_another_user(script: str, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a shell script as `nobody`, who has no rights here but everybody's."""
    command = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "sh",
        "-euc",
        script,
        "sh",
        *map(str, words),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


THEFTS = {
    "the raylet's socket is moved away": 'mv "$1/sockets/raylet" "$1/sockets/moved"',
    "the logs are moved away": 'mv "$1/logs" "$1/moved"',
    "the logs are read": 'cat "$1/logs/gcs_server.out"',
    "the latest session is another": 'rm "$1/../session_latest" && ln -s /etc '
    '"$1/../session_latest"',
    "the current cluster is another": 'echo 127.0.0.1:9 > "$1/../ray_current_cluster"',
    "the whole directory is moved away": 'mv "$1/../.." "$1/../../../moved"',
}


@pytest.mark.machine_root
@pytest.mark.parametrize("theft", THEFTS.values(), ids=THEFTS.keys())
def test_another_user_of_the_machine_touches_none_of_rays_files(
    own_cluster: OwnCluster, theft: str
) -> None:
    assert as_another_user("true").returncode == 0, "this user cannot become another: run as root"
    assert as_another_user(theft, own_cluster.session).returncode != 0
    assert (own_cluster.session / "sockets" / "raylet").is_socket()
    assert (own_cluster.session / "logs" / "gcs_server.out").is_file()
    assert not (own_cluster.session.parent / "ray_current_cluster").exists()


def test_the_cluster_of_one_machine_listens_on_loopback_alone(own_cluster: OwnCluster) -> None:
    # the last of its ports
    wait_until(lambda: any(own_cluster.session.glob("metrics_export_port_*")))
    host = psutil.Process(own_cluster.process.pid)
    sockets = [
        each
        for process in (host, *host.children(recursive=True))
        for each in process.net_connections("inet")
    ]
    listening = [ip_address(each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN]
    assert len(listening) > 5
    assert [
        str(ip) for ip in listening if not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
    ] == []


def test_a_stranger_on_the_same_machine_does_not_get_into_the_cluster_that_a_command_started(
    own_cluster: OwnCluster, tmp_path: Path
) -> None:
    address, token = own_cluster.address, own_cluster.token

    def enter(script: str = STRANGER, **knowing: str) -> "subprocess.Popen[str]":
        local = {
            "HOME": str(tmp_path),
            # else Ray would ask at another address of this machine
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_NUM_REDIS_GET_RETRIES": "2",  # seconds for which a stranger knocks
        }
        environment: Mapping[str, str] = without_token() | local | knowing
        command = [sys.executable, "-c", script, address]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    strangers = [enter(), enter(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64)]
    friend = enter(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    ours = enter(ATTACH, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64, RAY_ADDRESS=address)
    for stranger in strangers:
        said, complained = stranger.communicate(timeout=120)
        assert stranger.returncode != 0
        assert "it is in" not in said
        assert "auth" in complained.lower()
    assert "it is in" in friend.communicate(timeout=120)[0]
    # the command itself names the token as the mistake
    assert "lets in who has its token (it refuses" in ours.communicate(timeout=120)[0]


@pytest.mark.parametrize(
    "mode", ["disabled", "DISABLED", "off", ""]
)  # Ray takes whatever it does not know for disabled
def test_a_command_starts_no_cluster_that_is_open_to_all(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(ConfigError, match="unset it, or set it to 'token'"),
        attached(ClusterSection()),
    ):
        pass


@pytest.mark.parametrize("token", ["", "x", " " * 40, "fifteen letters"])
def test_a_command_starts_no_cluster_with_a_token_that_can_be_guessed(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(ConfigError, match="which nobody can guess, are wanted"),
        attached(ClusterSection()),
    ):
        pass


ATTACH = """
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection
from stillhouse.errors import ConfigError
try:
    with attached(ClusterSection(address="auto")):
        print("attached")
except ConfigError as error:
    print(error)
"""
FORGERIES = {
    "a file": (
        'mkdir "$1/ray" && echo "$2" > "$1/ray/ray_current_cluster"',
        "may be another user's work",
    ),
    "a directory in this user's name": (
        f'mkdir -p "$1/stillhouse-{os.geteuid()}/ray" && echo "$2" > '
        f'"$1/stillhouse-{os.geteuid()}/ray/ray_current_cluster"',
        "not a directory of your own",
    ),
    "a process": (
        'ln -s "$(command -v sh)" "$1/raylet" && exec "$1/raylet" -c "while :; do sleep 1; done" '
        '--gcs-address="$2"',
        "belongs to none",
    ),
}


@pytest.mark.machine_root
@pytest.mark.parametrize(("forge", "words"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_driver_sends_its_token_to_no_cluster_that_another_user_names(
    forge: str, words: str
) -> None:
    place = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    place.chmod(0o1777)
    environment = os.environ | {"RAY_TMPDIR": str(place), "RAY_ADDRESS": "auto"}
    with socket.create_server(("127.0.0.1", 0)) as thief:
        thief.setblocking(False)
        address = f"127.0.0.1:{thief.getsockname()[1]}"
        forger = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "sh",
            "-uc",
            forge,
            "sh",
            str(place),
            address,
        ]
        with subprocess.Popen(forger) as another_user:
            try:
                wait_until(lambda: another_user.poll() == 0 or (place / "raylet").exists())
                answer = subprocess.run(
                    [sys.executable, "-c", ATTACH],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
            finally:
                another_user.kill()
                rmtree(place)
        assert words in answer.stdout
        with pytest.raises(BlockingIOError):
            thief.accept()
