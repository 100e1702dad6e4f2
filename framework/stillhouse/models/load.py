"""Loading a model: its weights in the config's dtype, on a device.

A model some of whose weights are not in its files is refused: they would be random.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from stillhouse.config import ModelSection
from stillhouse.errors import ConfigError, ModelError
from stillhouse.model_path import source_of
from stillhouse.models.attention import attend_by_document
from stillhouse.models.sources import from_hub


def resolve_device(device: str) -> torch.device:
    """The torch device; 'auto' is cuda where there is a GPU.

    Raises ConfigError where cuda is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda', but torch sees no GPU here; set it to 'auto' or 'cpu', or install "
            "a CUDA build of torch"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def load_model(
    section: ModelSection,
    *,
    device_map: str | torch.device | Mapping[str, Any] | None = None,
    random_init_seed: int | None = None,
    nf4: bool = False,
    by_document: bool = True,
) -> PreTrainedModel:
    """A model in the section's dtype and in eval mode: with its weights, placed by `device_map`
    (None: CPU), or with random ones on the CPU, by seed. `nf4` holds the weights of its linear
    layers but the head in 4 bits; bitsandbytes has to be installed. `by_document` is False for a
    model that writes: it needs a cache, and so the attention that transformers chooses.

    Raises ModelError: absent, gated, of an unknown architecture, or with weights that are not in
    its files.
    """
    # Its architecture.
    source, dtype = source_of(section.model), getattr(torch, section.dtype)
    pinned = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    config = from_hub(lambda: AutoConfig.from_pretrained(source, **pinned), "config", section.model)
    _require_causal(section.model, config)
    model: PreTrainedModel

    # With its own weights.
    if random_init_seed is None:
        model, report = from_hub(
            lambda: AutoModelForCausalLM.from_pretrained(
                source,
                **pinned,
                dtype=dtype,
                device_map=device_map,
                quantization_config=_nf4_config(dtype) if nf4 else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below by name
            ),
            "model",
            section.model,
        )
        _check_loading(section.model, report)
        model.eval()
        if by_document:
            attend_by_document(model)
        return model

    # With random weights.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_init_seed)
        model = from_hub(
            lambda: AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=section.trust_remote_code
            ),
            "model",
            section.model,
        )
    attend_by_document(model.eval())
    return model


def _nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Each block of 64 weights has a scale in float32, its largest magnitude. Scales are not
    quantised once more: that takes their mean, whose last bits are another machine's."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=dtype,
    )


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write config and weights as safetensors; without the bar of transformers, which would stand
    among our own."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _require_causal(name: str, config: PretrainedConfig) -> None:
    """Raise ModelError unless the architecture is a causal language model."""
    own_classes = getattr(config, "auto_map", {})
    if (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        and "AutoModelForCausalLM" not in own_classes
    ):
        raise ModelError(
            f"{name} is a {config.model_type} model, not a causal language model; use one that "
            "predicts the next token from those before"
        )


def _check_loading(name: str, report: Mapping[str, Any]) -> None:
    """Raise ModelError where weights were not in the files; `report` is transformers' own."""
    wrong = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    if wrong:
        raise ModelError(
            f"the files of {name} lack {len(wrong)} of the model's weights, or have them in "
            f"another shape: {', '.join(wrong[:4])}. They would be random: fetch the whole model, "
            "or use the architecture that it was saved from"
        )
