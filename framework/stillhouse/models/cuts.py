"""A model cut from a larger one: some of its layers, in their order, with some of the channels of
their MLPs, and all that is outside of them. A student begins better from its teacher's layers than
from random weights (DistilBERT, arXiv 1910.01108, section 3).

Shapes: I channels of an MLP, H hidden.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stillhouse.atomic import whole_directory
from stillhouse.config import CutSection, ModelSection
from stillhouse.errors import ConfigError, ModelError
from stillhouse.models.load import load_model, save_model

_GATED = ("gate_proj", "up_proj", "down_proj")


def write_cut(section: ModelSection, cut: CutSection, folder: Path) -> None:
    """Write the section's model, cut down, to `folder`, atomically; nothing where that is there
    already. The whole model is in this process's memory meanwhile.

    Raises as `load_model` and `cut_model` do, ConfigError where it cannot be written.
    """
    if folder.is_dir():
        return
    lm = load_model(section)
    cut_model(lm, cut, model=section.model)
    try:
        with whole_directory(folder) as draft:
            save_model(lm, draft)
    except OSError as error:
        raise ConfigError(
            f"cannot write the student, cut from {section.model}, to {folder}: {error.strerror}; "
            "give --run-dir a place with room"
        ) from error


def cut_model(lm: PreTrainedModel, cut: CutSection, *, model: str) -> None:
    """Cut a model down, in place. Raises as `cut_layers` and `cut_channels` do."""
    cut_layers(lm, cut.layers, model=model)
    if cut.intermediate_size is not None:
        cut_channels(lm, cut.intermediate_size, model=model)
    _require_same_from_config(lm)


def cut_channels(lm: PreTrainedModel, num_kept: int, *, model: str) -> None:
    """Leave each gated MLP its `num_kept` channels of the greatest weights, in their order, in
    place: those whose norms in the three matrices have the greatest product.

    Raises ConfigError where there are no more than that, ModelError where the architecture has no
    gated MLPs with matrices of their own.
    """
    # the MLPs
    config, body = lm.config.get_text_config(), lm.get_decoder()
    num_channels = getattr(config, "intermediate_size", 0)
    mlps = [each for each in body.modules() if _is_gated(each, num_channels)]
    if len(mlps) != config.num_hidden_layers:
        why = f"of its {config.num_hidden_layers} layers {len(mlps)} have a gated MLP"
        raise ModelError(_uncuttable(lm, why))
    if num_kept >= num_channels:
        raise ConfigError(
            f"student.init.intermediate_size is {num_kept}, and the MLPs of {model} have "
            f"{num_channels} channels; give fewer, or leave it out"
        )
    # the channels that stay
    for mlp in mlps:
        gate, up, down = (getattr(mlp, name) for name in _GATED)
        norms = [gate.weight.norm(dim=1), up.weight.norm(dim=1), down.weight.norm(dim=0)]
        product_I = norms[0].float() * norms[1].float() * norms[2].float()
        kept = product_I.topk(num_kept).indices.sort().values
        for layer in (gate, up):
            layer.weight = nn.Parameter(layer.weight.data[kept])
            layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.data[kept])
            layer.out_features = num_kept
        down.weight = nn.Parameter(down.weight.data[:, kept].contiguous())
        down.in_features = num_kept
    config.intermediate_size = num_kept


def _is_gated(module: Any, num_channels: int) -> bool:
    """Whether it is an MLP of three plain matrices, which map H to I, H to I and I to H."""
    layers: list[Any] = [getattr(module, name, None) for name in _GATED]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return False
    return [each.out_features for each in layers[:2]] == [num_channels] * 2


def cut_layers(lm: PreTrainedModel, layers: Sequence[int], *, model: str) -> None:
    """Cut a model down to these layers, numbered from 0, in place.

    Raises ConfigError where it has no such layer, ModelError where layers cannot be cut out of its
    architecture.
    """
    # its layers
    config = lm.config.get_text_config()
    num_layers, body = config.num_hidden_layers, lm.get_decoder()
    if too_high := [layer for layer in layers if layer >= num_layers]:
        raise ConfigError(
            f"student.init.layers has {too_high[0]}, but the layers of {model} are 0 to "
            f"{num_layers - 1}"
        )
    stacks = [
        name
        for name, child in body.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    if len(stacks) != 1:
        raise ModelError(_uncuttable(lm, f"it has {len(stacks)} stacks of {num_layers} layers"))
    # those that stay, with their new numbers, in the model and in its config
    stack = getattr(body, stacks[0])
    kept = nn.ModuleList([stack[layer] for layer in layers])
    module: Any
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    setattr(body, stacks[0], kept)
    _cut_config(config, layers)


def _require_same_from_config(lm: PreTrainedModel) -> None:
    """Raise ModelError unless the config alone makes a model of the same shapes again."""
    with torch.device("meta"):
        again = AutoModelForCausalLM.from_config(lm.config)
    shapes = [
        {name: tuple(each.shape) for name, each in each_lm.state_dict().items()}
        for each_lm in (lm, again)
    ]
    if shapes[0] != shapes[1]:
        raise ModelError(_uncuttable(lm, "its config names layers of several kinds by number"))


def _cut_config(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Make the config that of a model with these layers alone."""
    num_layers = config.num_hidden_layers
    values: dict[str, Any] = config.to_dict()
    config.num_hidden_layers = len(layers)
    for name, value in values.items():
        # such as layer_types
        if "layer" in name and isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, [value[layer] for layer in layers])


def _uncuttable(lm: PreTrainedModel, why: str) -> str:
    return (
        f"{type(lm).__name__} cannot be cut: {why}; use a student of its "
        'own, with student.init = "weights"'
    )
