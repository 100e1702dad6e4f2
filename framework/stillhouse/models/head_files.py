"""A model's head from its files, without the model: for an engine that keeps its own.

What the head is (scale, soft cap, bias, names) is read off the architecture on the meta device, and
proven on a random model of the same config without layers. Its rows are read from safetensors by
slice, so a rank of many reads its own rows alone.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from stillhouse.config import ModelSection
from stillhouse.errors import ModelError
from stillhouse.logits import Head
from stillhouse.model_path import source_of
from stillhouse.models.files import INDEX, WHOLE
from stillhouse.models.heads import compare_head, head_of
from stillhouse.models.sources import from_hub

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # those of 8 bits have a scale elsewhere
_PROBE_IDS = 256  # of the random model, whose vocabulary decides nothing
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """What a head is, and under which names a checkpoint may hold its tensors."""

    vocab_size: int  # rows that are read
    weight_names: tuple[str, ...]  # the first that is there is taken
    bias_names: tuple[str, ...]  # none: there is no bias
    scale: float
    softcap: float | None


def plan_head(section: ModelSection, *, vocab_size: int) -> HeadPlan:
    """The head of a model, cut to the tokenizer's vocabulary; no weight is read.

    Raises ModelError: no linear head, fewer rows than the tokenizer has ids, or something between
    last hidden states and logits that is not known here.
    """
    config: PretrainedConfig = from_hub(lambda: _config_of(section), "config", section.model)
    with torch.device("meta"):
        model = from_hub(lambda: _model_of(section, config), "model", section.model)
    head = head_of(model, vocab_size=vocab_size)
    toy = from_hub(lambda: _without_layers(section, config), "model", section.model)
    compare_head(toy, head_of(toy, vocab_size=_PROBE_IDS))
    return HeadPlan(
        vocab_size,
        _names_of(model, "weight"),
        () if head.bias_V is None else _names_of(model, "bias"),
        scale=head.scale,
        softcap=head.softcap,
    )


def read_head(section: ModelSection, plan: HeadPlan, *, rows: slice, device: torch.device) -> Head:
    """Some rows of a head (a slice with both ends), in the section's dtype, on a device.

    A model of the hub is read from the cache, and what is not there is fetched. Raises ModelError
    for a head that is quantised or not in the files.
    """
    dtype = getattr(torch, section.dtype)
    weight_VH = _read(section, plan.weight_names, rows).to(device, dtype)
    bias_V = _read(section, plan.bias_names, rows).to(device, dtype) if plan.bias_names else None
    return Head(weight_VH, bias_V, scale=plan.scale, softcap=plan.softcap)


def _config_of(section: ModelSection) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(
        source_of(section.model),
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    return config


def _model_of(section: ModelSection, config: PretrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, trust_remote_code=section.trust_remote_code
    )
    model.eval()
    return model


def _without_layers(section: ModelSection, config: PretrainedConfig) -> PreTrainedModel:
    """A random float32 model of the same config, between whose embeddings and head only the final
    norm is left; its vocabulary is small."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == num_layers:  # a value a layer
            setattr(text, name, [])
    text.num_hidden_layers, text.vocab_size = 0, _PROBE_IDS
    for name in _SPECIAL_IDS:
        setattr(text, name, None)
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return _model_of(section, config)


def _names_of(model: PreTrainedModel, kind: str) -> tuple[str, ...]:
    """The names that a checkpoint may give a tensor of the head: its own, and where it is tied that
    of the embeddings first; with and without the body's name in front."""
    layers = [model.get_output_embeddings()]
    if kind == "weight" and model.config.get_text_config().tie_word_embeddings:
        layers.insert(0, model.get_input_embeddings())
    wanted = [getattr(layer, kind) for layer in layers]
    named = dict(model.named_parameters(remove_duplicate=False))
    own = [name for tensor in wanted for name, each in named.items() if each is tensor]
    bare = [name.removeprefix(f"{model.base_model_prefix}.") for name in own]
    return tuple(dict.fromkeys([*own, *bare]))


def _read(section: ModelSection, names: Sequence[str], rows: slice) -> Tensor:
    """Rows of the first of these tensors that the files hold."""
    files = _files_by_name(section)
    name = next((name for name in names if name in files), None)
    path = None if name is None else _path_of(section, files[name])
    if name is None or path is None:
        raise ModelError(
            f"the files of {section.model} hold no tensor of the head ({' or '.join(names)}) that "
            "is a matrix of floats in safetensors; use a model whose head is not quantised"
        )
    with safe_open(path, framework="pt") as tensors:
        found: Tensor = tensors.get_slice(name)[rows]
    if found.dtype not in _FLOATS or len(found) != rows.stop - rows.start:
        raise ModelError(
            f"{name} of {section.model} is no head of {rows.stop} rows of floats (found "
            f"{found.dtype}); use a model whose head is not quantised"
        )
    return found


def _files_by_name(section: ModelSection) -> Mapping[str, str]:
    """The file that holds each tensor of a model's safetensors."""
    whole = _path_of(section, WHOLE)
    if whole is not None:
        with safe_open(whole, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), WHOLE)
    index = _path_of(section, INDEX)
    if index is None:
        return {}
    files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return files


def _path_of(section: ModelSection, file: str) -> Path | None:
    """A file of a local directory, or of the hub's cache, into which it is fetched. None where
    there is none."""
    source = source_of(section.model)
    if Path(source).is_dir():
        path = Path(source) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, file, revision=section.revision))
    except EntryNotFoundError:
        return None
