"""The images install what was locked, hold no secret, and run as an unprivileged user."""

import re
import socket
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.environments import ROOT
from stillhouse.cluster import node
from stillhouse.cluster.ray_directory import machine_directory, ray_directory
from stillhouse.errors import RunError

IMAGES = ("cpu", "gpu", "vllm")


def locked(image: str) -> dict[str, str]:
    """The one version of each package."""
    lines = (ROOT / f"docker/{image}.lock").read_text().splitlines()
    return {
        match[1]: match[2] for line in lines if (match := re.match(r"([\w.-]+)==([\w.+!-]+)", line))
    }


@pytest.mark.parametrize("image", IMAGES)
def test_a_lock_has_all_that_stillhouse_asks_for_and_a_hash_of_everything(image: str) -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = locked(image)
    for each in map(Requirement, asked):
        assert each.specifier.contains(found[each.name], prereleases=True), each
    entries = re.split(
        r"^(?=[\w.-]+==)", (ROOT / f"docker/{image}.lock").read_text(), flags=re.MULTILINE
    )
    assert len(entries) - 1 == len(found)
    assert all("--hash=sha256:" in entry for entry in entries[1:])


def test_only_the_cpu_image_has_no_cuda() -> None:
    assert not any(name.startswith("nvidia-") for name in locked("cpu"))
    for image in ("gpu", "vllm"):
        assert any(name.startswith("nvidia-cudnn") for name in locked(image))


def test_the_two_environments_of_the_image_for_vllm_can_work_together() -> None:
    """As `teacher.python` asks for it: one Ray; and the vLLM that the extra allows."""
    assert locked("vllm")["ray"] == locked("gpu")["ray"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    [asked] = map(Requirement, extras["vllm"])
    assert asked.specifier.contains(locked("vllm")[asked.name])
    text = (ROOT / "docker/vllm.Dockerfile").read_text()
    for place in ("/opt/stillhouse", "/opt/vllm"):
        assert f"{place}/bin/pip install --no-deps --no-build-isolation /src" in text
        assert f"COPY --from=build {place} {place}" in text


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_pinned_runs_as_a_number_and_takes_no_secret(image: str) -> None:
    text = (ROOT / f"docker/{image}.Dockerfile").read_text()
    assert re.search(r"^ARG BASE=[\w.:/-]+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE}", "${BASE}"]
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]
    assert re.findall(r"^ARG (\w+)", text, re.MULTILINE) == ["BASE"]
    assert not re.search(r"TOKEN|SECRET|PASSWORD|_KEY", text)
    assert "--require-hashes" in text


def test_a_machine_is_well_while_its_head_answers_or_it_has_none(tmp_path: Path) -> None:
    node.require_health(tmp_path)
    current = ray_directory(machine_directory(tmp_path))
    current.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as head:
        (current / "ray_current_cluster").write_text(f"127.0.0.1:{head.getsockname()[1]}")
        node.require_health(tmp_path)
    with pytest.raises(RunError, match="does not answer"):
        node.require_health(tmp_path)
