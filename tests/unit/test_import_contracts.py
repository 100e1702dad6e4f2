"""The walls hold for modules that nobody has thought of yet: one in the wrong room fails `make check`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("place", "line", "broken"),
    [
        ("misc.py", "import logging", "Floors"),  # on no floor
        ("student/extra.py", "import ray", "Doors to Ray"),
        ("tracking/extra.py", "import deepspeed", "Doors to DeepSpeed"),
        ("logits/extra.py", "from stillhouse.store import Recipe", "Floors"),
        ("losses/extra.py", "from stillhouse.config import Config", "The mathematics and the bytes"),
        ("pipeline/extra.py", "from stillhouse import cli", "Floors"),
    ],
)
def test_a_module_in_the_wrong_room_breaks_its_contract(tmp_path: Path, place: str, line: str, broken: str) -> None:
    shutil.copytree(ROOT / "framework", tmp_path / "framework", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "framework" / "stillhouse" / place).write_text(f'"""Planted."""\n\n{line}\n')
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    found = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "framework")}, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 1, found.stdout + found.stderr
    assert any(broken in each and "BROKEN" in each for each in found.stdout.splitlines()), found.stdout
