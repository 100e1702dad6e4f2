"""The walls hold for modules that nobody has thought of yet: one in the wrong room fails `make
check`."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
        (
            "losses/extra.py",
            "from stillhouse.config import Config",
            "The mathematics and the bytes",
        ),
        ("pipeline/extra.py", "from stillhouse import cli", "Floors"),
    ],
)
def test_a_module_in_the_wrong_room_breaks_its_contract(
    tmp_path: Path, place: str, line: str, broken: str
) -> None:
    shutil.copytree(
        ROOT / "framework", tmp_path / "framework", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "framework" / "stillhouse" / place).write_text(f'"""Planted."""\n\n{line}\n')
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    found = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "framework")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 1, found.stdout + found.stderr
    assert any(broken in each and "BROKEN" in each for each in found.stdout.splitlines()), (
        found.stdout
    )


PRIVATE_OF_OTHERS = {  # beside what the files named _*_compat.py are for
    "bench/peers.py": [
        "trl.experimental.async_distillation.async_distillation_trainer._jsd_loss_chunk"
    ],
    "sequences/tables.py": ["dataset._fingerprint"],
    "student/heartbeat.py": ["sys._current_frames"],
}


LOADED = """
import sys
import stillhouse.teacher.actor
from stillhouse.engines.choice import engine_named
engines = [engine_named(name) for name in ("text", "rollouts", "openai")]
heavy = ("accelerate", "datasets", "deepspeed", "pandas", "transformers", "vllm")
print([name for name in heavy if name in sys.modules])
"""


def test_teachers_without_a_model_load_none_of_the_libraries_of_models() -> None:
    shown = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, "[]\n"), shown.stderr


def test_only_the_compat_files_use_private_names_of_ray_and_deepspeed() -> None:
    package = ROOT / "framework" / "stillhouse"
    texts = {
        path.relative_to(package).as_posix(): path.read_text()
        for path in package.rglob("*.py")
        if not path.match("_*_compat.py")
    }
    found = {name: [*private_uses(text)] for name, text in texts.items()}
    assert {name: uses for name, uses in found.items() if uses} == PRIVATE_OF_OTHERS


@pytest.mark.parametrize(
    "line",
    [
        "from ray._private import ray_constants",
        "import ray._raylet",
        "from ray import _raylet",
        "import ray.train.v2.api.config",
        "ray._private.worker.global_worker.connected",
        "ray.init(_temp_dir=directory)",
        "deepspeed.ops.__compatible_ops__ = {}",
        "self.engine._config.load_universal_checkpoint = True",
        "from unittest.mock import patch",
    ],
)
def test_a_private_name_is_seen_in_each_form(line: str) -> None:
    assert [*private_uses(line)]


def private_uses(text: str) -> Iterator[str]:
    """What a module imports, passes and takes of others that these keep to themselves;
    `unittest.mock` counts as such, too."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import() | ast.ImportFrom():
                base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                names = [
                    base + each.name for each in node.names if not each.name.endswith("_compat")
                ]
                yield from (
                    name
                    for name in names
                    if "._" in name or name.startswith(("_", "ray.train.v2", "unittest"))
                )
            case ast.keyword(arg=str() as name) if name.startswith("_"):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) if name.startswith("_") and (
                not name.endswith("__") or name == "__compatible_ops__"
            ):
                yield ast.unparse(node)
