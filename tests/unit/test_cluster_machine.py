"""A machine that cannot carry a command says so before the command begins, by what was found, what
is wanted and what to do."""

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers.command import Outcome, as_toml, stillhouse
from helpers.world import TinyWorld
from stillhouse.cluster import machine

COMMAND = Path(sys.executable).parent / "stillhouse"
FEW = 64  # files
NO_LOOPBACK = ("unshare", "--map-root-user", "--net")
FEW_FILES = ("prlimit", f"--nofile={FEW}:{FEW}")
NO_ACCOUNT = ("unshare", "--map-user=4242", "env", "--unset=HOME")


@pytest.fixture(scope="module")
def config(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(as_toml(tiny_world.values))
    return path


def on_such_a_machine(limits: tuple[str, ...], *words: str | Path, **environment: str) -> Outcome:
    """`stillhouse WORDS`, in a process of its own, with the limits and variables of another
    machine."""
    command = [*limits, str(COMMAND), *map(str, words)]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    assert outcome.err.count("error: ") == 1
    for word in words:
        assert word in outcome.err


LACKS: dict[str, tuple[tuple[str, ...], Mapping[str, str], str]] = {
    "enough open files": (FEW_FILES, {}, f"may open {FEW} files"),
    "loopback": (NO_LOOPBACK, {}, "ip link set lo up"),
    "the directory for Ray": ((), {"RAY_TMPDIR": "/proc/absent"}, "set RAY_TMPDIR to"),
    "a directory for Ray, where a file is": (
        (),
        {"RAY_TMPDIR": "/etc/passwd"},
        "set RAY_TMPDIR to",
    ),
    "a home with a cache": (
        (),
        {"HOME": "/proc/absent", "XDG_CACHE_HOME": ""},
        "set XDG_CACHE_HOME",
    ),
    "a cache, where a file is": ((), {"XDG_CACHE_HOME": "/etc/passwd"}, "set XDG_CACHE_HOME"),
    "files that may grow": (("prlimit", "--fsize=0"), {}, "set TMPDIR to"),
    "an account and a home": (NO_ACCOUNT, {}, "set HOME"),
}


@pytest.mark.parametrize(("limits", "environment", "words"), LACKS.values(), ids=LACKS.keys())
def test_a_run_is_refused_before_ray_is_asked_where_the_machine_lacks(
    limits: tuple[str, ...],
    environment: Mapping[str, str],
    words: str,
    config: Path,
    tmp_path: Path,
) -> None:
    given = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    assert_refused(
        on_such_a_machine(limits, "run", config, "--run-dir", tmp_path / "run", **given), words
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limits", [FEW_FILES, NO_LOOPBACK], ids=["enough open files", "loopback"])
def test_a_machine_becomes_no_head_where_it_lacks(limits: tuple[str, ...]) -> None:
    assert_refused(on_such_a_machine(limits, "node", "head"), "this machine cannot")


ATTACH = """
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection
from stillhouse.errors import ConfigError
try:
    with attached(ClusterSection(num_cpus=1)):
        print("attached")
except ConfigError as error:
    print(error)
"""


def test_whatever_starts_a_cluster_asks_first() -> None:
    """Evaluation, repair and benchmarks, too."""
    command = [*NO_LOOPBACK, *FEW_FILES, sys.executable, "-c", ATTACH]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"may open {FEW} files" in said
    assert "ip link set lo up" in said


def test_check_names_all_that_the_machine_lacks(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/absent")
    monkeypatch.setenv("TMPDIR", "/proc/absent")
    outcome = stillhouse("check", config, "--run-dir", "/proc/run", cache=tmp_path / "cache")
    assert_refused(outcome, "set RAY_TMPDIR to", "--run-dir: nothing can be written in /proc")
    assert "note: TMPDIR is /proc/absent" in outcome.out


def test_a_home_that_cannot_be_written_is_no_obstacle_where_the_cache_is_elsewhere(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/absent")
    outcome = stillhouse("check", config, "--run-dir", tmp_path / "run", cache=tmp_path / "cache")
    assert outcome.code == 0, outcome


def test_a_token_is_not_written_where_home_cannot_be_and_the_cure_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/proc/absent")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert_refused(
        stillhouse("node", "token"),
        "cannot write /proc/absent/.ray/auth_token",
        "set RAY_AUTH_TOKEN_PATH",
    )


def test_a_low_soft_limit_is_raised_and_refuses_nothing() -> None:
    assert machine.open_files(limits=(FEW, 4096), num_cpus=8) == []
    asked = (
        "import resource; from stillhouse.cluster import machine; machine.raise_open_files(); "
        "print(resource.getrlimit(7))"
    )
    command = ["prlimit", f"--nofile={FEW}:4096", sys.executable, "-c", asked]
    assert (
        subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
        == "(4096, 4096)"
    )


def test_the_files_that_are_wanted_grow_with_the_processors() -> None:
    assert machine.open_files(limits=(512, 512), num_cpus=8) == []
    (lack,) = machine.open_files(limits=(512, 512), num_cpus=192)
    assert "may open 512 files" in lack
    assert machine.open_files(limits=(512, resource.RLIM_INFINITY), num_cpus=192) == []


def test_a_small_shared_memory_is_worth_a_note_and_no_obstacle() -> None:
    assert machine.shared_memory(num_free_bytes=1 << 30, wanted_bytes=256 << 20) == []
    (note,) = machine.shared_memory(num_free_bytes=64 << 10, wanted_bytes=256 << 20)
    assert "/dev/shm" in note
