"""Our settings as vLLM's own arguments and config; and what is refused before an engine starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.vllmtoys import make_toy, recipe_of, section_of
from stillhouse.config import TeacherSection
from stillhouse.engines import _vllm_compat
from stillhouse.engines.vllm import VllmEngine
from stillhouse.engines.vllm_config import arguments_of
from stillhouse.errors import ConfigError, ModelError

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with eight heads, which eight GPUs can share."""
    folder = tmp_path_factory.mktemp("mixture")
    return make_toy(folder, "qwen3_moe", num_heads=8, hidden_size=256)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("llama"), "llama")


def on_gpus(folder: Path, **settings: Any) -> TeacherSection:
    return TeacherSection.model_validate(
        {"model": str(folder), "engine": "vllm", "num_gpus": 8, "vllm": settings}
    )


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {"parallel.tensor_parallel_size": 8, "model.quantization": None}),
        ({"expert_parallel": True}, {"parallel.enable_expert_parallel": True}),
        ({"quantization": "fp8"}, {"model.quantization": "fp8"}),
        ({"kv_cache_dtype": "fp8"}, {"cache.cache_dtype": "fp8"}),
        ({"max_batched_tokens": 512}, {"scheduler.max_num_batched_tokens": 512}),
        ({"memory_share": 0.5}, {"cache.gpu_memory_utilization": 0.5}),
        ({"kv_cache_gb": 2}, {"cache.kv_cache_memory_bytes": 2 * 10**9}),
        ({"tensor_parallel": 2}, {"parallel.tensor_parallel_size": 2}),
    ],
)
def test_vllms_config_holds_our_settings(
    mixture: Path, settings: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """As far as it is checked without a GPU."""
    _vllm_compat.prepare_environment()
    section = on_gpus(mixture, **settings)
    config = _vllm_compat.engine_config(
        writes=False,
        **arguments_of(section, sequence_length=96, device="cuda") | {"enforce_eager": True},
    )
    for name, value in wanted.items():
        part, _, field = name.partition(".")
        assert getattr(getattr(config, f"{part}_config"), field) == value
    assert config.scheduler_config.enable_chunked_prefill
    assert config.parallel_config.distributed_executor_backend == "mp"


def test_a_model_that_was_quantised_runs_as_its_files_say(mixture: Path, tmp_path: Path) -> None:
    _vllm_compat.prepare_environment()
    shutil.copytree(mixture, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    arguments = arguments_of(on_gpus(tmp_path), sequence_length=96, device="cuda")
    config = _vllm_compat.engine_config(writes=False, **arguments)
    assert "awq" in config.model_config.quantization


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sequence_length": 513}, ModelError, "sequences of 513 tokens"),
        ({"vocab_size": 321}, ModelError, "320 rows, fewer than the tokenizer's 321 ids"),
    ],
)
def test_a_recipe_that_the_model_cannot_fill_is_refused(
    llama: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        VllmEngine(section_of(llama), replace(recipe_of(), **changes), device="cpu")


def test_heads_without_a_kernel_on_the_cpu_are_refused(tmp_path: Path) -> None:
    folder = make_toy(tmp_path, "llama", hidden_size=32)
    with pytest.raises(ModelError, match="heads of 16 numbers, for which vLLM has no kernel"):
        VllmEngine(section_of(folder), recipe_of(), device="cpu")


def test_a_vllm_for_another_device_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"placed on cuda, but the vLLM .* runs on cpu"):
        VllmEngine(section_of(llama), recipe_of(), device="cuda")


def test_a_quantisation_that_vllm_does_not_know_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"fp7.*change corpus.sequence_length"):
        VllmEngine(section_of(llama, quantization="fp7"), recipe_of(), device="cpu")
