"""On a GPU, Liger's kernels compute a student's hidden states and gradients as torch does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from helpers.models import make_model
from stillhouse.config import StudentSection
from stillhouse.models.heads import final_hidden
from stillhouse.models.load import load_model
from stillhouse.student.liger import apply_liger


@pytest.fixture
def _architecture_is_put_back() -> Iterator[None]:
    """Liger replaces functions and classes of the architecture's module."""
    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


@pytest.mark.usefixtures("_architecture_is_put_back")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_hidden_states_and_gradients_are_those_of_torch(
    gpu: torch.device, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "student", weight_std=0.3)
    section = StudentSection.model_validate({"model": str(folder), "dtype": dtype, "liger": True})
    plain, fast = load_model(section), load_model(section)
    ids_BL, positions_BL = torch.arange(64).view(2, 32), torch.arange(32).expand(2, 32)

    def trained(lm: PreTrainedModel) -> list[torch.Tensor]:
        lm.to(gpu)  # type: ignore[arg-type]  # its typing knows no device here
        lm.train()
        hidden_BLH = final_hidden(lm, ids_BL.to(gpu), positions_BL.to(gpu))
        hidden_BLH.float().square().sum().backward()
        grads = [each.grad for each in lm.parameters() if each.grad is not None]
        return [hidden_BLH.detach(), *grads]

    expected = trained(plain)
    rotation = modeling_llama.apply_rotary_pos_emb
    apply_liger(fast, model=section.model, device=gpu)
    assert modeling_llama.apply_rotary_pos_emb is not rotation
    for found, wanted in zip(trained(fast), expected, strict=True):
        atol = tolerance * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=atol)
