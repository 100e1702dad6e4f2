"""A model cut from a larger one: some of its layers, in their order, and all that is outside of
them. A student begins better from its teacher's layers than from random weights (DistilBERT, arXiv
1910.01108, section 3).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stillhouse.atomic import whole_directory
from stillhouse.config import ModelSection
from stillhouse.errors import ConfigError, ModelError
from stillhouse.models.load import load_model, save_model


def write_cut(section: ModelSection, layers: Sequence[int], folder: Path) -> None:
    """Write the section's model, cut to these layers, to `folder`, atomically; nothing where that
    is there already. The whole model is in this process's memory meanwhile.

    Raises as `load_model` and `cut_layers` do, ConfigError where it cannot be written.
    """
    if folder.is_dir():
        return
    lm = load_model(section)
    cut_layers(lm, layers, model=section.model)
    try:
        with whole_directory(folder) as draft:
            save_model(lm, draft)
    except OSError as error:
        raise ConfigError(
            f"cannot write the student, cut from {section.model}, to {folder}: {error.strerror}; "
            "give --run-dir a place with room"
        ) from error


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
    # the config alone has to make the same model again
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
        f"{type(lm).__name__} cannot be cut to some of its layers: {why}; use a student of its "
        'own, with student.init = "weights"'
    )
