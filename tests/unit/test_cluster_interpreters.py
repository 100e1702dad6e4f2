"""An interpreter of its own for teachers is tried on each machine before Ray is asked for one: Ray
would start one that fails again and again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cluster.interpreters import (
    Interpreters,
    Versions,
    refusal,
    require_here,
    runtime_env_of,
)
from stillhouse.cluster.nodes import nodes_with_room
from stillhouse.cluster.placement import Placement
from stillhouse.errors import ConfigError

HERE = Versions.here()


def program(path: Path, line: str) -> str:
    """An executable script of one line."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_with_the_same_versions_is_taken() -> None:
    assert refusal(sys.executable, HERE) is None


def test_one_that_is_not_there_or_is_no_python_or_has_no_stillhouse_is_refused(
    tmp_path: Path,
) -> None:
    assert refusal(str(tmp_path / "python"), HERE) == (
        "it cannot be started (No such file or directory)"
    )
    assert refusal(str(tmp_path), HERE) == "it cannot be started (Permission denied)"
    assert refusal("/bin/true", HERE) == "it is no Python"
    bare = program(tmp_path / "bare", f'exec {sys.executable} -S -I "$@"')
    assert "No module named" in str(refusal(bare, HERE))


@pytest.mark.parametrize("other", [("3.9", *HERE[1:]), (HERE[0], "2.59.0", HERE[2])])
def test_one_with_another_python_or_ray_is_refused_with_what_was_found(
    tmp_path: Path, other: tuple[str, str, str]
) -> None:
    found = Versions(*other)
    script = program(tmp_path / "other", f"echo a greeting; echo '{json.dumps(found)}'")
    assert refusal(script, HERE) == f"found {found}"
    assert refusal(script, found) is None


def test_the_message_says_what_was_found_what_is_wanted_and_what_to_do() -> None:
    require_here(sys.executable, table="teacher")
    with pytest.raises(ConfigError, match="it is no Python") as refused:
        require_here("/bin/true", table="teacher")
    assert str(HERE) in str(refused.value)
    assert "leave teacher.python out" in str(refused.value)


def test_a_path_is_one_word_for_the_shell_that_ray_starts_it_by() -> None:
    environment = runtime_env_of("/opt/my env/bin/python")
    assert environment["py_executable"] == "'/opt/my env/bin/python'"
    assert environment["env_vars"]["PATH"] == "/opt/my env/bin:${PATH}"


@pytest.mark.usefixtures("ray_cluster")
def test_machines_on_which_a_teacher_fits_are_asked_and_no_others(tmp_path: Path) -> None:
    def require(python: str, **resources: float) -> None:
        where = Placement(0.25, 0.0, resources)
        Interpreters(python, lambda: nodes_with_room([where]), table="teacher").require(
            timeout_s=60.0
        )

    absent = str(tmp_path / "python")
    require(sys.executable)
    require(absent, elsewhere=1.0)
    with pytest.raises(ConfigError, match=r"- [\d.]+: it cannot be started \(No such file"):
        require(absent)


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_that_joins_later_is_asked_without_waiting_for_it(tmp_path: Path) -> None:
    there: list[dict[str, Any]] = []
    interpreters = Interpreters(str(tmp_path / "python"), lambda: there, table="teacher")
    interpreters.require(timeout_s=0.0)
    there += nodes_with_room([Placement(0.25, 0.0, {})])
    with pytest.raises(ConfigError, match="No such file"):
        look_again(interpreters)


def look_again(interpreters: Interpreters) -> None:
    """As the pool does between the events of its teachers."""
    for _ in range(600):
        interpreters.require(timeout_s=0.1)
