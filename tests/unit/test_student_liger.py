"""Liger's kernels: which models and machines they are refused for. What they compute is tested on a
GPU."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.models import make_model
from stillhouse.config import StudentSection, parse_config
from stillhouse.errors import ConfigError
from stillhouse.models.load import load_model
from stillhouse.student.adapters import outline
from stillhouse.student.liger import apply_liger

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def section(tmp_path: Path) -> StudentSection:
    return StudentSection(model=str(make_model(tmp_path / "student")), liger=True)


def install_liger(monkeypatch: pytest.MonkeyPatch, *types: str) -> list[dict[str, Any]]:
    """A Liger that knows these types of models; returns what it is asked to leave out and apply."""
    asked: list[dict[str, Any]] = []

    def apply(*, rope: bool = True, cross_entropy: bool = True, model: object = None) -> None:
        asked.append({"rope": rope, "cross_entropy": cross_entropy, "model": model})

    patching = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN=dict.fromkeys(types, apply))
    package = SimpleNamespace(monkey_patch=patching)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, package)
    return asked


def test_without_liger_the_extra_that_brings_it_is_named(
    section: StudentSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match=r"pip install 'stillhouse\[liger\]'"):
        outline(section)


def test_a_model_that_liger_does_not_know_is_refused_from_its_config_alone(
    section: StudentSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(section.model) / "model.safetensors").unlink()
    install_liger(monkeypatch, "qwen3", "gemma2")
    with pytest.raises(ConfigError, match=r"is a llama model, for .*, such as gemma2, qwen3"):
        outline(section)
    install_liger(monkeypatch, "llama")
    outline(section)


def test_liger_leaves_out_its_losses_and_runs_on_a_gpu_alone(
    section: StudentSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, lm = install_liger(monkeypatch, "llama"), load_model(section)
    apply_liger(lm, model=section.model, device=CUDA)
    assert asked == [{"rope": True, "cross_entropy": False, "model": lm}]
    with pytest.raises(ConfigError, match="this rank trains on the CPU"):
        apply_liger(lm, model=section.model, device=CPU)
    values = {"corpus": {"dataset": "d"}, "teacher": {"model": "t"}}
    with pytest.raises(ConfigError, match='liger is true, but device is "cpu"'):
        parse_config(values | {"student": {"model": "s", "liger": True, "device": "cpu"}})
