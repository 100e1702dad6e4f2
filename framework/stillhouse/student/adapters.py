"""Which weights of a student are trained: all, all but some, or low-rank adapters beside frozen
ones (LoRA, arXiv 2106.09685), which peft puts into the model.

A checkpoint holds no frozen weights. They are read again from where the student came from, and have
to have the same digest as when the training began.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.config import CutSection, LoraSection, StudentSection
from stillhouse.errors import CheckpointError, ConfigError
from stillhouse.models.cuts import cut_model
from stillhouse.models.load import load_model
from stillhouse.student.bits import bitsandbytes_for, dequantise, scales_of
from stillhouse.student.liger import require_liger
from stillhouse.student.optimiser import client_optimiser

FROZEN = "frozen_digest"  # in the files of a checkpoint

_SHOWN_NAMES = 12


def initial_student(section: StudentSection) -> PreTrainedModel:
    """The student before its first step, on the CPU, where it is quantised, too, so that its
    frozen weights have the same bits everywhere. Raises as `load_model` and `make_trainable` do,
    and ConfigError where bitsandbytes is wanted and not installed."""
    if is_quantised(section):
        _require_bitsandbytes()
        return make_trainable(load_model(section, device_map="cpu", nf4=True), section)
    seed = section.seed if section.init == "config" else None
    return make_trainable(load_model(section, random_init_seed=seed), section)


def outline(section: StudentSection) -> PreTrainedModel:
    """The student as it will be trained, on the meta device: shapes without values, and what will
    be quantised as if it were not. Nothing is loaded but its model's config. Raises as
    `initial_student`, `cut_model`, `require_liger` and `client_optimiser` do."""
    with torch.device("meta"):
        lm = load_model(section, random_init_seed=0)
        if isinstance(section.init, CutSection):
            cut_model(lm, section.init, model=section.model)
        if section.liger:
            require_liger(lm, model=section.model)
        client_optimiser(section)
        if is_quantised(section):
            _require_bitsandbytes()
        return make_trainable(lm, section)


def make_trainable(lm: PreTrainedModel, section: StudentSection) -> PreTrainedModel:
    """The same model with the section's adapters in it, and `requires_grad` where it is trained.

    Raises ConfigError where a setting fits none of its layers or leaves nothing to train, or peft
    is not installed.
    """
    if section.lora is not None:
        _adapt(lm, section.lora, section)
    _freeze(lm, section.freeze, model=section.model)
    return lm


def has_frozen(section: StudentSection) -> bool:
    """Whether some weights of the student are not trained."""
    return section.lora is not None or bool(section.freeze)


def is_quantised(section: StudentSection) -> bool:
    """Whether the frozen weights beside adapters are quantised."""
    return section.lora is not None and section.lora.quantise != "none"


def needs_outline(section: StudentSection) -> bool:
    """Whether `outline` may refuse more than the section shows: layers, names, missing packages."""
    has_extras = section.liger or section.optimiser != "adamw"
    return has_frozen(section) or has_extras or isinstance(section.init, CutSection)


def _freeze(lm: PreTrainedModel, patterns: Sequence[str], *, model: str) -> None:
    """Freeze the parameters with these names; a tied one has several."""
    parameters = list(lm.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [parameter for name, parameter in parameters if fnmatchcase(name, pattern)]
        if not found:
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name, _ in parameters})
            raise ConfigError(
                f"student.freeze: no weight of {model} is named {pattern!r}; its weights are "
                f"{_some(kinds)}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in parameters):
        raise ConfigError(
            f"student.freeze: {', '.join(map(repr, patterns))} freeze every weight of {model}; "
            "leave some to be trained"
        )


def _adapt(lm: PreTrainedModel, lora: LoraSection, section: StudentSection) -> None:
    """Put adapters into the model, at which it computes what it did, and freeze all else."""
    peft = _peft()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(lm, lora.targets, model=section.model),
        base_model_name_or_path=section.model,
        revision=section.revision,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(section.seed)
        peft.inject_adapter_in_model(config, lm)


def _targets(lm: PreTrainedModel, wanted: Sequence[str], *, model: str) -> list[str]:
    """The layers to adapt, by the last parts of their names: those that are wanted, or all linear
    ones but the head."""
    # the linear layers
    head = lm.get_output_embeddings()
    linear = {path: layer for path, layer in lm.named_modules() if isinstance(layer, nn.Linear)}
    names = sorted({path.rpartition(".")[2] for path, layer in linear.items() if layer is not head})
    # what fits none of them, and the head, whose loss is computed without its forward
    for target in wanted or names:
        found = [layer for path, layer in linear.items() if f".{path}".endswith(f".{target}")]
        if any(layer is head for layer in found):
            raise ConfigError(
                f"student.lora.targets: {target!r} names the head of {model}, which is fused with "
                f"the loss and cannot be adapted; name other layers, of {_some(names)}"
            )
        if not found:
            raise ConfigError(
                f"student.lora.targets: {target!r} names no linear layer of {model}; name some of "
                f"{_some(names)}, or leave targets out, to adapt them all"
            )
    if not names:
        raise ConfigError(
            f"student.lora: {model} has no linear layers beside its head; leave lora out"
        )
    return list(wanted or names)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def widen_adapters(lm: PreTrainedModel) -> None:
    """Put the adapters alone in float32, for their trained values."""
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge_adapters(lm: PreTrainedModel) -> None:
    """Add each adapter's product to its matrix, dequantised where it is quantised: a plain model,
    with the same logits. Added in float32, and rounded once to the matrix's dtype."""
    dequantise(lm)
    layer_type: Any = _peft().tuners.tuners_utils.BaseTunerLayer
    adapted = [(path, each) for path, each in lm.named_modules() if isinstance(each, layer_type)]
    for path, layer in adapted:
        dtype = layer.get_base_layer().weight.dtype
        base = layer.float().get_base_layer()
        base.weight.data += layer.get_delta_weight("default")
        lm.set_submodule(path, base.to(dtype))
    del lm.peft_config


def adapter_files(lm: PreTrainedModel) -> tuple[Any, Mapping[str, Tensor]]:
    """The adapters of a model as peft saves them: its LoraConfig, and tensors by peft's names."""
    weights = _peft().get_peft_model_state_dict(lm, save_embedding_layers=False)
    named = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
    return lm.peft_config["default"], named


def frozen_names(module: nn.Module) -> set[str]:
    """The names of all parameters that are not trained; a tied one has several."""
    everything = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in everything if not parameter.requires_grad}


def frozen_digest(lm: nn.Module) -> str | None:
    """A digest of the names and values of all weights that are not trained; None where there are
    none."""
    frozen = [(name, each) for name, each in lm.named_parameters() if not each.requires_grad]
    if not frozen:
        return None
    hasher = xxhash.xxh3_128()
    for name, parameter in sorted(frozen, key=lambda each: each[0]):
        hasher.update(name.encode())
        for values in (parameter, *scales_of(parameter)):
            values = values.detach().cpu().contiguous().flatten()
            hasher.update(values.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def require_same_frozen(found: object, *, wanted: object, model: str) -> None:
    """Raise CheckpointError unless a model's frozen weights have the digest of a checkpoint's."""
    if found != wanted:
        raise CheckpointError(
            f"the checkpoint holds what was trained beside other weights than those of {model}: "
            f"its frozen weights have the digest {found}, the training began with {wanted}. Give "
            "the model that it began with: student.model, and student.revision for one of the hub"
        )


def _require_bitsandbytes() -> None:
    bitsandbytes_for('student.lora.quantise = "nf4"')


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"student.lora needs peft, which cannot be imported ({error}); install it with "
            "`pip install 'stillhouse[lora]'`, on every machine"
        ) from None
    return peft
