"""bitsandbytes, which the extra `bits` installs: an optimiser's states in 8 bits, and weights in 4,
each with the scales of its blocks."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import ConfigError


def bitsandbytes_for(setting: str) -> ModuleType:
    """The package. Raises ConfigError, which names the setting that needs it, where it is not
    installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs bitsandbytes, which cannot be imported ({error}); install it with "
            "`pip install 'stillhouse[bits]'`, on every machine"
        ) from None
    package: ModuleType = bitsandbytes
    return package


def scales_of(parameter: nn.Parameter) -> Sequence[Tensor]:
    """What the values of a weight follow from beside its own bits; nothing unless quantised."""
    state: Any = getattr(parameter, "quant_state", None)
    return [] if state is None else [state.absmax, state.code]


def dequantise(lm: PreTrainedModel) -> None:
    """Put plain linear layers in the place of those in 4 bits, with the weights that these compute
    with, in the dtype of the embeddings; where there are none, the model stays as it is."""
    quantised: list[tuple[str, Any]] = [
        (path, layer)
        for path, layer in lm.named_modules()
        if any(scales_of(each) for each in layer.parameters(recurse=False))
    ]
    if not quantised:
        return
    # the layers
    functional: Any = bitsandbytes_for("a model in 4 bits").functional
    dtype = lm.get_input_embeddings().weight.dtype
    for path, layer in quantised:
        weight_OI = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        num_outputs, num_inputs = weight_OI.shape
        plain = nn.Linear(num_inputs, num_outputs, bias=False, device="meta")
        plain.weight = nn.Parameter(weight_OI.to(dtype), requires_grad=False)
        plain.bias = layer.bias
        lm.set_submodule(path, plain)
    # what Transformers says of them
    model: Any = lm
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
