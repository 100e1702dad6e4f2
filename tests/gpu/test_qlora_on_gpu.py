"""On a GPU, adapters beside weights of 4 bits learn as beside the same weights dequantised."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.models import make_model
from stillhouse.config import StudentSection
from stillhouse.models.heads import final_hidden
from stillhouse.models.load import save_model
from stillhouse.student.adapters import frozen_digest, initial_student, merge_adapters
from stillhouse.student.bits import dequantise


def section_of(folder: Path, *, quantise: str, dtype: str) -> StudentSection:
    lora = {"rank": 4, "quantise": quantise}
    return StudentSection.model_validate({"model": str(folder), "dtype": dtype, "lora": lora})


def as_trained(section: StudentSection) -> PreTrainedModel:
    """With products that are not zero, as they are at the beginning."""
    lm, generator = initial_student(section), torch.Generator().manual_seed(3)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return lm


def on(device: torch.device, lm: PreTrainedModel) -> PreTrainedModel:
    """There, as DeepSpeed moves it: Transformers refuses to move a quantised model itself."""
    nn.ModuleList([lm]).to(device)
    return lm


def hidden_of(lm: PreTrainedModel, device: torch.device) -> Tensor:
    ids_BL = torch.arange(64, device=device).view(2, 32)
    return final_hidden(lm, ids_BL, torch.arange(32, device=device).expand(2, 32))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_gradients_and_the_merged_model_are_those_beside_the_dequantised_weights(
    gpu: torch.device, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    # weights of 4 bits; and a model that has the same ones in its files
    folder = make_model(tmp_path / "student", hidden_size=128, weight_std=0.1)
    section = section_of(folder, quantise="nf4", dtype=dtype)
    quantised = as_trained(section)
    digest = frozen_digest(quantised)
    kept = {type(each).__name__ for each in quantised.modules() if isinstance(each, nn.Linear)}
    assert {"Linear4bit", "Linear"} <= kept
    assert type(quantised.get_output_embeddings()) is nn.Linear
    plain = initial_student(section)
    dequantise(plain)
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "base_layer"):
            plain.set_submodule(name, layer.base_layer)
    del plain.peft_config
    save_model(plain, tmp_path / "dequantised")
    twin = as_trained(section_of(tmp_path / "dequantised", quantise="none", dtype=dtype))

    # both on the device: hidden states, and gradients of the adapters
    hiddens = [hidden_of(on(gpu, lm).train(), gpu) for lm in (quantised, twin)]
    for hidden in hiddens:
        hidden.float().square().sum().backward()
    gradients = [
        {name: each.grad for name, each in lm.named_parameters() if each.grad is not None}
        for lm in (quantised, twin)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    pairs = [tuple(hiddens), *((gradients[0][name], gradients[1][name]) for name in gradients[0])]
    for found, wanted in pairs:
        atol = tolerance * float(wanted.abs().max())
        assert atol > 0.0
        torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=atol)

    # moving changed no bit, and the merged model computes the same
    assert frozen_digest(quantised) == digest
    merge_adapters(quantised)
    assert {str(each.dtype) for each in quantised.parameters()} == {f"torch.{dtype}"}
    assert not any("4bit" in type(each).__name__ for each in quantised.modules())
    found, wanted = (each.detach().float() for each in (hidden_of(quantised, gpu), hiddens[1]))
    assert float((found - wanted).norm()) < tolerance * float(wanted.norm())
