"""Liger's Triton kernels (arXiv 2410.10989) for a student's layers: norms, rotary positions and
gated MLPs, each one pass over memory. Its losses are left out: the student's head has its own."""

from collections.abc import Callable, Mapping
from inspect import signature

import torch
from transformers import PreTrainedModel

from stillhouse.errors import ConfigError

_SHOWN_TYPES = 12


def require_liger(lm: PreTrainedModel, *, model: str) -> None:
    """Raise ConfigError unless liger-kernel is installed and has kernels for the model's layers,
    which may be on the meta device."""
    known = _appliers()
    model_type = lm.config.model_type
    is_own = not type(lm).__module__.startswith("transformers.")
    if is_own or model_type not in known:
        found = "code of its own" if is_own else f"a {model_type} model"
        some = ", ".join(sorted(known)[:_SHOWN_TYPES])
        raise ConfigError(
            f"student.liger: {model} is {found}, for which liger-kernel has no kernels; set it to "
            f"false, or use a model of a type that it knows, such as {some}"
        )


def apply_liger(lm: PreTrainedModel, *, model: str, device: torch.device) -> None:
    """Make the layers of a model on the CPU compute with Liger's kernels, once they are on
    `device`. They keep their weights and the weights' names.

    Positions are rotated by a function of the architecture's module, so the rotation changes for
    every model of that architecture in this process. Raises as `require_liger` does, and
    ConfigError where `device` is not a GPU.
    """
    if device.type != "cuda":
        raise ConfigError(
            "student.liger is true, but this rank trains on the CPU, for which Liger's kernels are "
            "not compiled; set it to false, or train on a GPU"
        )
    require_liger(lm, model=model)
    # some types have no loss of Liger's to leave out
    apply = _appliers()[lm.config.model_type]
    losses = {"cross_entropy", "fused_linear_cross_entropy"}
    apply(model=lm, **dict.fromkeys(losses.intersection(signature(apply).parameters), False))


def _appliers() -> Mapping[str, Callable[..., None]]:
    """The functions that apply Liger's kernels to a model, by its type."""
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ConfigError(
            f"student.liger needs liger-kernel, which cannot be imported ({error}); install it "
            "with `pip install 'stillhouse[liger]'`, on every machine"
        ) from None
    appliers: Mapping[str, Callable[..., None]] = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    return appliers
