"""The optimiser of a student: DeepSpeed's settings, which parameters decay, and the learning rate
of each step."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stillhouse.checkpoint.scratch import scratch_folder
from stillhouse.config import StudentSection
from stillhouse.errors import ConfigError
from stillhouse.student.bits import bitsandbytes_for

# parameters of a rank whose states are in memory at one time, in four buffers of 4 bytes each; or
# those of its largest matrix, where that has more
SWAPPED_AT_ONCE = 50_000_000


def learning_rate_at(step: int, *, section: StudentSection, total_steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then the section's schedule from `learning_rate` to
    `min_learning_rate` at `total_steps`."""
    highest, lowest = section.learning_rate, section.min_learning_rate
    if step < section.warmup_steps:
        return highest * (step + 1) / section.warmup_steps
    # the share of the peak's height above the lowest that is left
    begin = section.warmup_steps
    if section.schedule == "wsd":
        begin = max(begin, total_steps - decay_steps_of(section, total_steps=total_steps))
    progress = min(1.0, max(0, step - begin) / max(1, total_steps - begin))
    is_cosine = section.schedule == "cosine"
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if is_cosine else 1.0 - progress
    return lowest + (highest - lowest) * left


def decay_steps_of(section: StudentSection, *, total_steps: int) -> int:
    """The last steps in which "wsd" (warm-up, stable, decay) lowers the learning rate; a tenth of
    all where the section does not say (MiniCPM, arXiv 2404.06395, section 4.3)."""
    return max(1, total_steps // 10) if section.decay_steps is None else section.decay_steps


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; gains and biases do not."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def client_optimiser(section: StudentSection) -> Callable[..., Optimizer] | None:
    """What makes the optimiser of parameter groups, where DeepSpeed does not: bitsandbytes' AdamW,
    with both states in 8 bits, quantised in blocks of 256 (arXiv 2110.02861). None: DeepSpeed
    makes it from its config. Raises ConfigError where bitsandbytes is not installed."""
    if section.optimiser == "adamw":
        return None
    make: Any = bitsandbytes_for('student.optimiser = "adamw_8bit"').optim.AdamW8bit
    return partial(make, lr=section.learning_rate, betas=section.betas)


@contextmanager
def swap_folder(section: StudentSection) -> Iterator[Path]:
    """A folder of this rank's own in `offload_path`. Raises ConfigError where there can be none."""
    assert section.offload_path is not None, "the config wants it with nvme"
    parent = Path(section.offload_path).expanduser()
    with ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch_folder(parent))
        except OSError as error:
            raise ConfigError(
                f"student.offload_path is {section.offload_path!r}, where no folder can be made "
                f"({error}); name a directory on a local disk of every machine"
            ) from None
        yield folder


def deepspeed_config(
    section: StudentSection, num_micro_batches: int, *, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's config. The optimiser, unless it is a client's, is torch's own AdamW: it needs no
    compiler, and its fused form steps on the CPU too."""
    adamw: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": list(section.betas),
        "torch_adam": True,
    }
    zero: dict[str, Any] = {"stage": section.chosen_stage}
    if section.fused_adamw or section.offload != "none":
        adamw["fused"] = True
    if section.overlap_comm is not None:
        zero["overlap_comm"] = section.overlap_comm
    if section.offload != "none":
        zero["offload_optimizer"] = {
            "device": section.offload,
            "pin_memory": device.type == "cuda",
        }
    if section.offload == "nvme":
        zero["offload_optimizer"]["nvme_path"] = section.offload_path
        zero["sub_group_size"] = SWAPPED_AT_ONCE
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": section.micro_batch_sequences,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": section.gradient_clip,
        "zero_optimization": zero,
        "checkpoint": {"tag_validation": "Ignore"},  # all ranks have the same tag
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if section.optimiser == "adamw":
        config["optimizer"] = {"type": "AdamW", "params": adamw}
    else:
        config["zero_allow_untested_optimizer"] = True  # by DeepSpeed's authors
    if section.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        # 64 bf16 accumulations lose 25 times the precision
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
