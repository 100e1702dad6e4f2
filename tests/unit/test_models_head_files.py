"""A head that is read from files is the head of the loaded model, row for row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.models import make_model
from stillhouse.config import ModelSection
from stillhouse.errors import ModelError
from stillhouse.models.head_files import plan_head, read_head
from stillhouse.models.heads import head_of
from stillhouse.models.load import load_model

VOCAB_SIZE = 270  # of the tokenizer; heads have 300 rows
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},
    "gpt2": {},
    "mixtral": {},
}
CPU = torch.device("cpu")


def saved(folder: Path, architecture: str, *, tied: bool = False) -> ModelSection:
    make_model(
        folder,
        architecture=architecture,
        vocab_size=300,
        tokenizer_vocab_size=VOCAB_SIZE,
        tied=tied,
        config=CASES[architecture],
    )
    return ModelSection(model=str(folder), dtype="float32")


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Replace tensors of a model's file; a name has `_` for its dots."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, tensor in tensors.items():
        weights[name.replace("_", ".").replace("lm.", "lm_")] = tensor
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", CASES)
def test_rows_from_the_files_are_those_of_the_loaded_model(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    section = saved(tmp_path, architecture, tied=tied)
    if architecture == "phi":
        change(tmp_path, lm_head_bias=torch.arange(300.0))
    wanted = head_of(load_model(section), vocab_size=VOCAB_SIZE)
    plan = plan_head(section, vocab_size=VOCAB_SIZE)
    for rows in (slice(0, VOCAB_SIZE), slice(100, 137), slice(9, 9)):
        found = read_head(section, plan, rows=rows, device=CPU)
        assert torch.equal(found.weight_VH, wanted.weight_VH[rows])
        assert (found.scale, found.softcap) == (wanted.scale, wanted.softcap)
        assert (found.bias_V is None) == (wanted.bias_V is None)
        if found.bias_V is not None and wanted.bias_V is not None:
            assert torch.equal(found.bias_V, wanted.bias_V[rows])


def test_a_head_is_found_in_the_file_of_many_that_holds_it(tmp_path: Path) -> None:
    section = saved(tmp_path / "whole", "llama")
    model = AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32)
    model.save_pretrained(tmp_path / "cut", max_shard_size="40KB")
    assert len([*(tmp_path / "cut").glob("*.safetensors")]) > 1
    cut = ModelSection(model=str(tmp_path / "cut"), dtype="bfloat16")
    plan = plan_head(cut, vocab_size=VOCAB_SIZE)
    found = read_head(cut, plan, rows=slice(3, 8), device=CPU)
    assert torch.equal(found.weight_VH, model.lm_head.weight[3:8].bfloat16())


@pytest.mark.parametrize("method", ["fp8", "awq", "compressed-tensors"])
def test_a_body_that_is_quantised_does_not_matter(tmp_path: Path, method: str) -> None:
    section = saved(tmp_path, "llama")
    wanted = load_model(section).lm_head.weight
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_head(section, vocab_size=VOCAB_SIZE)
    found = read_head(section, plan, rows=slice(0, 5), device=CPU)
    assert torch.equal(found.weight_VH, wanted[:5])


def test_a_head_with_fewer_rows_than_the_tokenizer_has_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="300 rows, fewer than the tokenizer's 301"):
        plan_head(saved(tmp_path, "llama"), vocab_size=301)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_head_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    section = saved(tmp_path, "llama")
    change(tmp_path, lm_head_weight=torch.zeros(300, 32).to(dtype))
    plan = plan_head(section, vocab_size=VOCAB_SIZE)
    with pytest.raises(ModelError, match="use a model whose head is not quantised"):
        read_head(section, plan, rows=slice(0, VOCAB_SIZE), device=CPU)


def test_a_head_that_is_not_in_the_files_is_refused(tmp_path: Path) -> None:
    section = saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    plan = plan_head(section, vocab_size=VOCAB_SIZE)
    with pytest.raises(ModelError, match=r"no tensor of the head \(lm_head.weight\)"):
        read_head(section, plan, rows=slice(0, VOCAB_SIZE), device=CPU)
