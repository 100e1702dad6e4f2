"""Who has no token gets into no cluster of ours, and no machine becomes part of one without."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from helpers.command import stillhouse
from stillhouse import node
from stillhouse.cluster import attached
from stillhouse.config import ClusterSection
from stillhouse.errors import ConfigError

TOKEN = "a token that nobody guesses"

HOST = """
import os, sys, ray
from stillhouse.cluster import attached
from stillhouse.config import ClusterSection
with attached(ClusterSection(num_cpus=1)):
    print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    sys.stdin.read()
"""
STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(lambda: "it is in").remote()))
"""


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
    command = node.head(port=6379, resources={"student": 8.0}, autoscaling=None, block=False)
    assert "--dashboard-host=127.0.0.1" in command
    assert '--resources={"student": 8.0}' in command


def without_token() -> dict[str, str]:
    """The environment of somebody who was never told of any cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}


@pytest.fixture
def cluster_of_a_command() -> Iterator[tuple[str, str]]:
    """Address and token of a cluster that a command started on this machine by itself."""
    command = [sys.executable, "-c", HOST]
    with subprocess.Popen(command, env=without_token(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        address, token = host.stdout.readline().split()
        yield address, token
        host.communicate(timeout=60)


def test_a_stranger_on_the_same_machine_does_not_get_into_the_cluster_that_a_command_started(
    cluster_of_a_command: tuple[str, str], tmp_path: Path
) -> None:
    address, token = cluster_of_a_command

    def enter(**knowing: str) -> "subprocess.Popen[str]":
        environment: Mapping[str, str] = without_token() | {"HOME": str(tmp_path)} | knowing
        command = [sys.executable, "-c", STRANGER, address]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    strangers = [enter(), enter(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64)]
    friend = enter(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    for stranger in strangers:
        said, complained = stranger.communicate(timeout=120)
        assert stranger.returncode != 0
        assert "it is in" not in said
        assert "auth" in complained.lower()
    assert "it is in" in friend.communicate(timeout=120)[0]


@pytest.mark.parametrize("mode", ["disabled", "DISABLED", "off", ""])  # Ray takes whatever it does not know for disabled
def test_a_command_starts_no_cluster_that_is_open_to_all(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="unset it, or set it to 'token'"), attached(ClusterSection()):
        pass
