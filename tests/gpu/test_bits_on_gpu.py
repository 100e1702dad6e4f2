"""On a GPU, bitsandbytes computes what it is taken for: an AdamW with states of 8 bits."""

import torch
from torch import Tensor, nn

from stillhouse.config import StudentSection
from stillhouse.student.optimiser import client_optimiser, parameter_groups

NUM_STEPS, LEARNING_RATE, WEIGHT_DECAY = 20, 1e-2, 0.1


def test_an_adamw_of_8_bits_steps_nearly_as_one_of_32(gpu: torch.device) -> None:
    """Its largest error is a small share of the way that a weight went; decay is decoupled."""
    section = StudentSection(
        model="s", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, optimiser="adamw_8bit"
    )
    make = client_optimiser(section)
    assert make is not None

    def trained(*, bits: int) -> tuple[Tensor, torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        layer = nn.Linear(128, 64, bias=False)
        nn.init.normal_(layer.weight, generator=generator)
        layer.to(gpu)
        groups = parameter_groups(layer, WEIGHT_DECAY)
        optimiser = (
            make(groups)
            if bits == 8
            else torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=section.betas)
        )
        for _ in range(NUM_STEPS):
            gradient = torch.randn(64, 128, generator=generator) + 0.5
            layer.weight.grad = gradient.to(gpu)
            optimiser.step()
        return layer.weight.detach(), optimiser

    found, optimiser = trained(bits=8)
    expected, _ = trained(bits=32)
    (state,) = optimiser.state.values()
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    error = (found - expected).abs()
    way = NUM_STEPS * LEARNING_RATE
    assert 0.0 < float(error.max()) < 0.2 * way
    assert float(error.mean()) < 0.02 * way
