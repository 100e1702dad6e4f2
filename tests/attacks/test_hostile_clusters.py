"""Who has no token gets into no cluster of ours, and no machine becomes part of one without."""

import stat
from pathlib import Path

import pytest

from helpers.command import stillhouse
from stillhouse import node
from stillhouse.errors import ConfigError

TOKEN = "a token that nobody guesses"


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
