"""On a GPU the student's head takes its kernels by itself; its loss and gradients are as near to
float64 as torch's own on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.logits import CompressedLogits, Head, TargetSpec, compress, token_seeds
from stillhouse.losses.distillation import distillation_loss
from stillhouse.losses.divergences import divergence_named
from stillhouse.losses.head_passes import backend_for

T, V, H, K = 700, 30_011, 128, 32
SETTINGS = [
    {},
    {"scale": 0.7, "softcap": 12.0},
    {"temperature": 2.0, "num_draws": 12},
    {
        "scale": 1.3,
        "softcap": 20.0,
        "temperature": 1.7,
        "num_draws": 5,
        "ce_weight": 0.5,
        "z_loss_weight": 1e-3,
    },
]


def gradients(
    hidden: Tensor,
    weight: Tensor,
    target: CompressedLogits,
    labels: Tensor,
    *,
    block_tokens: int | None = None,
    **setting: Any,
) -> list[Tensor]:
    """Loss, and its gradients in hidden states and weight, in float64 on the CPU."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    terms = distillation_loss(
        hidden,
        Head(weight, scale=setting.get("scale", 1.0), softcap=setting.get("softcap")),
        target,
        divergence=divergence_named("forward_kl", 0.5),
        labels_T=labels,
        ce_weight=setting.get("ce_weight", 0.0),
        z_loss_weight=setting.get("z_loss_weight", 0.0),
        block_tokens=block_tokens,
    )
    found = [terms.total, *torch.autograd.grad(terms.total, [hidden, weight])]
    return [tensor.detach().double().cpu() for tensor in found]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: ", ".join(setting) or "plain")
def test_loss_and_gradients_are_as_near_to_float64_as_torchs_own(
    gpu: torch.device, setting: dict[str, Any], dtype: torch.dtype
) -> None:
    """Relative to the norm of each. Torch's path in the same dtype, on the CPU, sets how near that
    has to be."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(T, H, generator=random).to(dtype),
        (3 * torch.randn(V, H, generator=random) / H**0.5).to(dtype),
    )
    num_draws, temperature = int(setting.get("num_draws", 0)), setting.get("temperature", 1.0)
    seeds = token_seeds(0, torch.zeros(T), torch.arange(T))
    target = compress(
        4 * torch.randn(T, V, generator=random),
        TargetSpec(V, K, num_draws=num_draws, temperature=temperature),
        seeds_T=seeds,
    )
    labels = torch.randint(V, (T,), generator=random)
    assert backend_for(weight.to(gpu)).name == "triton"
    exact = gradients(hidden.double(), weight.double(), target, labels, **setting)
    torchs = gradients(hidden, weight, target, labels, **setting)
    on_gpu = target.map(lambda tensor: tensor.to(gpu))
    for block_tokens in (None, 256):
        ours = gradients(
            hidden.to(gpu),
            weight.to(gpu),
            on_gpu,
            labels.to(gpu),
            block_tokens=block_tokens,
            **setting,
        )
        for found, usual, wanted in zip(ours, torchs, exact, strict=True):
            assert (found - wanted).norm() <= 1.5 * (usual - wanted).norm() + 1e-5 * wanted.norm()
