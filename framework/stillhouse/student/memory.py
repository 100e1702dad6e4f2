"""The memory that a student's weights, gradients and optimiser take on a rank, by arithmetic, and
the ZeRO stage that follows from it (arXiv 1910.02054, section 3.1)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stillhouse.config import ModelSection, StudentSection
from stillhouse.student.adapters import is_quantised

# of a device's memory: the rest is for activations, a block's logits and what the allocator wastes
USABLE_SHARE = 0.8
# a trained parameter in the host's memory where the optimiser is offloaded: its float32 copy, both
# moments, and the sums and copies of gradients and weights that DeepSpeed keeps beside them
OFFLOADED_BYTES = 22

_GRADIENT_BYTES = 4  # its sum in float32
_OPTIMISER_BYTES = 12  # in float32: a copy of the weight, and Adam's two moments
_WITHOUT_ZERO_BYTES = 8  # the two moments: stage 0, for float32 alone, copies no weight
_8BIT_SAVES_BYTES = 6  # of both moments in float32
_NF4_BYTES = 0.5 + 4 / 64  # of a weight, with the scale of each 64


@dataclass(frozen=True, slots=True)
class StudentSize:
    """The number of a student's parameters."""

    num_trained: int
    num_frozen: int
    num_in_frozen_layers: int = 0  # of the frozen ones: what `lora.quantise` is for


def size_of(lm: Any) -> StudentSize:
    """The size of a student: a model of Transformers, which may be on the meta device, as that of
    `adapters.outline` is."""
    num_trained = sum(each.numel() for each in lm.parameters() if each.requires_grad)
    num_frozen = sum(each.numel() for each in lm.parameters()) - num_trained
    head = lm.get_output_embeddings()
    linear = [each for each in lm.modules() if isinstance(each, nn.Linear) and each is not head]
    in_layers = sum(each.weight.numel() for each in linear if not each.weight.requires_grad)
    return StudentSize(num_trained, num_frozen, in_layers)


def memory_of_process(section: ModelSection, gpu_bytes: float) -> float:
    """The bytes that one process has of GPUs with so much memory each: a rank uses one GPU, or its
    part of one that processes share; a teacher all that it reserves."""
    num_gpus = section.num_gpus or 1.0
    return gpu_bytes * (min(num_gpus, 1.0) if isinstance(section, StudentSection) else num_gpus)


def state_bytes(size: StudentSize, section: StudentSection, *, stage: int, num_ranks: int) -> float:
    """The bytes of weights, gradients and optimiser on the device of one of `num_ranks` ranks."""
    whole, divided = _whole_and_divided(size, section, stage=stage)
    return whole + divided / num_ranks


def least_ranks(
    size: StudentSize, section: StudentSection, *, stage: int, budget_bytes: float
) -> int | None:
    """The fewest ranks on which `state_bytes` are within the budget; None where no number is
    enough."""
    whole, divided = _whole_and_divided(size, section, stage=stage)
    if whole >= budget_bytes:
        return None
    return max(1, -int(-divided // (budget_bytes - whole)))


def lowest_stage(
    size: StudentSize, section: StudentSection, *, num_ranks: int, budget_bytes: float
) -> int:
    """The lowest ZeRO stage, from `chosen_stage` on, whose `state_bytes` are within the budget; the
    highest where none is, which is 3, or 2 with weights that stage 3 cannot divide."""
    last = 2 if is_quantised(section) or section.compile else 3
    for stage in range(section.chosen_stage, last):
        if state_bytes(size, section, stage=stage, num_ranks=num_ranks) <= budget_bytes:
            return stage
    return last


def _whole_and_divided(
    size: StudentSize, section: StudentSection, *, stage: int
) -> tuple[float, float]:
    """The bytes that every rank has, and those that the ranks share."""
    weight = getattr(torch, section.dtype).itemsize
    # an offloaded optimiser has its sums of gradients in the host's memory, too
    is_offloaded = section.offload != "none"
    gradient = weight if is_offloaded else _GRADIENT_BYTES
    # stage 1 sums gradients in bfloat16 after the backward pass, and has all of them until then
    unsummed = weight if stage == 1 and section.dtype == "bfloat16" else 0
    optimiser = _WITHOUT_ZERO_BYTES if stage == 0 else _OPTIMISER_BYTES
    if section.optimiser == "adamw_8bit":
        optimiser -= _8BIT_SAVES_BYTES
    num_nf4 = size.num_in_frozen_layers if is_quantised(section) else 0
    parts = {
        1: size.num_trained * (0 if is_offloaded else optimiser),
        2: size.num_trained * (gradient + unsummed),
        3: (size.num_trained + size.num_frozen - num_nf4) * weight + num_nf4 * _NF4_BYTES,
    }
    whole = sum(num_bytes for divided_from, num_bytes in parts.items() if stage < divided_from)
    return whole, sum(parts.values()) - whole
