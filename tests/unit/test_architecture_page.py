"""What docs/architecture.md tells the reader to write does what it says."""

import re
from pathlib import Path
from typing import Any

import torch

from stillhouse.logits import Head, TargetSpec, compress
from stillhouse.losses.distillation import distillation_loss
from stillhouse.losses.divergences import Divergence

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_divergence_of_ones_own_trains_as_autograd_of_its_definition_would() -> None:
    (section,) = re.findall(r"### A divergence of your own\n(.*?)\n### ", PAGE, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    random = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(9, 6, dtype=torch.float64, generator=random).requires_grad_()
    weight_VH = torch.randn(40, 6, dtype=torch.float64, generator=random).requires_grad_()
    target = compress(3 * torch.randn(9, 40, generator=random), TargetSpec(40, 5))
    inputs: dict[str, Any] = {"hidden_TH": hidden_TH, "head": Head(weight_VH), "target": target}
    names: dict[str, Any] = {
        "distillation_loss": distillation_loss,
        "Divergence": Divergence,
    } | inputs
    exec(code, names)
    assert len(code.split("\n\n\n")[0].splitlines()) <= 5

    ids_TK = target.token_ids_TK.long()
    kept_TK = (hidden_TH @ weight_VH.T).softmax(1).gather(1, ids_TK)
    q_TK1 = torch.cat([kept_TK, 1 - kept_TK.sum(1, keepdim=True)], 1)
    p_TK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], 1).double().exp()
    wanted = (0.5 * (p_TK1.sqrt() - q_TK1.sqrt()).square().sum(1)).mean()
    # the target's masses are float32
    torch.testing.assert_close(names["terms"].total / 9, wanted.detach(), rtol=1e-6, atol=0)
    for leaf, gradient in zip(
        (hidden_TH, weight_VH), torch.autograd.grad(wanted, [hidden_TH, weight_VH]), strict=True
    ):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-8)
