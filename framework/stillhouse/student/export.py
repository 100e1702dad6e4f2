"""Export: a committed checkpoint as a plain Hugging Face directory, which
`AutoModelForCausalLM.from_pretrained` opens, or as an adapter of peft's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.atomic import DISK, FileLayer, whole_directory
from stillhouse.checkpoint.choice import newest_copy
from stillhouse.config import StudentSection
from stillhouse.errors import CheckpointError, ConfigError
from stillhouse.models.load import load_model, save_model
from stillhouse.retry import DEFAULT_PATIENCE, Patience, Tell
from stillhouse.student.adapters import (
    adapter_files,
    frozen_digest,
    frozen_names,
    has_frozen,
    initial_student,
    merge_adapters,
    require_same_frozen,
    widen_adapters,
)
from stillhouse.student.weights import consolidated_weights, frozen_digest_in, weight_files


def export(
    checkpoints: str,
    out: Path,
    *,
    section: StudentSection,
    tokenizer: PreTrainedTokenizerBase,
    card: Callable[[int], str],
    tell: Tell,
    adapter: bool = False,
    step: int | None = None,
    patience: Patience = DEFAULT_PATIENCE,
) -> int:
    """Write the newest commit of `checkpoints`, or that of `step`, to `out`: safetensors in the
    student's dtype, config, tokenizer and model card. Returns the optimiser steps behind the
    weights.

    `adapter` writes the adapters of a student with LoRA alone, as peft reads them; else they are
    merged into the weights. `card(steps)` is the text of the card. Waits while the store is
    unavailable, and reports that to `tell`. Raises CheckpointError where there is no commit, or its
    weights do not fit the model; ConfigError where `out` cannot be written, or there are no
    adapters; StoreUnavailable at the end of the patience.
    """
    if adapter and section.lora is None:
        raise ConfigError(
            "this student was trained without student.lora, so it has no adapter; leave --adapter "
            "out, to write the whole model"
        )
    # the weights that were trained, and the files that are made of them
    model, steps = _committed(checkpoints, section, tell=tell, step=step, patience=patience)
    # the adapters alone, or a whole model
    if adapter:
        write_adapter(model, tokenizer, out, card=card(steps), section=section)
        return steps
    # or the whole model
    if section.lora is not None:
        merge_adapters(model)
    model.generation_config = generation_config_of(section) or model.generation_config
    write_model(model, tokenizer, out, card=card(steps))
    return steps


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    card: str,
    files: FileLayer = DISK,
) -> None:
    """Write model, tokenizer and card to a directory that is absent or empty, atomically. Raises
    ConfigError where it cannot be written."""
    with _written(out, files) as draft:
        save_model(model, draft)
        tokenizer.save_pretrained(draft)
        (draft / "README.md").write_text(card, encoding="utf-8")


def write_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    card: str,
    section: StudentSection,
) -> None:
    """As `write_model`, but of the weights the adapters alone: `PeftModel.from_pretrained` adds
    them to the model that the student came from."""
    config, weights = adapter_files(model)
    dtype = getattr(torch, section.dtype)
    in_dtype = {name: weight.to(dtype) for name, weight in weights.items()}
    with _written(out, DISK) as draft:
        config.save_pretrained(draft)
        save_file(in_dtype, draft / "adapter_model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(draft)
        (draft / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _written(out: Path, files: FileLayer) -> Iterator[Path]:
    """The directory that is `out` once the block ends. Raises ConfigError where it cannot be
    written."""
    try:
        with whole_directory(out.resolve(), files=files) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"cannot write the model to {out}: {why}; name a new directory, in one with room that "
            "you may write"
        ) from error


def load_trained(
    checkpoints: str,
    section: StudentSection,
    *,
    tell: Tell,
    step: int | None = None,
    patience: Patience = DEFAULT_PATIENCE,
) -> tuple[PreTrainedModel, int]:
    """The model of the newest commit, or of that of `step`, on the CPU and in the student's dtype,
    with its adapters merged, and the optimiser steps behind it. Waits and raises as `export`
    does."""
    model, steps = _committed(checkpoints, section, tell=tell, step=step, patience=patience)
    if section.lora is not None:
        merge_adapters(model)
    return model, steps


def _committed(
    checkpoints: str, section: StudentSection, *, tell: Tell, step: int | None, patience: Patience
) -> tuple[PreTrainedModel, int]:
    """The model of the newest commit, or of that of `step`, in the student's dtype, and its
    adapters, where it has some, in float32."""
    # the weights that were trained
    with newest_copy(checkpoints, weight_files, step=step, tell=tell, patience=patience) as copy:
        if copy is None:
            of_step = "" if step is None else f"of step {step} "
            raise CheckpointError(
                f"there is no checkpoint {of_step}under {checkpoints}; train first, with "
                "`stillhouse run` or `stillhouse train`. If that was on other machines, "
                "student.checkpoint_url has to name a place that this one sees, too"
            )
        found, folder = copy
        weights = consolidated_weights(folder, zero_stage=found.origin.zero_stage)
        frozen = frozen_digest_in(folder) if has_frozen(section) else None
    # in the model that it began with, or one of its architecture
    if not has_frozen(section):
        model = load_model(section, random_init_seed=0)
    else:
        model = initial_student(section)
        require_same_frozen(frozen_digest(model), wanted=frozen, model=section.model)
    if section.lora is not None:
        widen_adapters(model)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = sorted(set(missing) - set(model.all_tied_weights_keys) - frozen_names(model))
    if unexpected or missing:
        raise CheckpointError(
            f"the checkpoint of step {found.step} does not fit {section.model}: missing "
            f"{missing[:4]}, unexpected {list(unexpected)[:4]}; was student.model changed?"
        )
    model.tie_weights()
    if section.lora is None:
        model.to(getattr(torch, section.dtype))
    return model, found.step


def generation_config_of(section: StudentSection) -> GenerationConfig | None:
    """The generation config that the student came with, which alone has a chat model's list of end
    tokens. None where it came with none that can be saved."""
    try:
        found = GenerationConfig.from_pretrained(section.model, revision=section.revision or "main")
        found.validate(strict=True)
    except (OSError, ValueError):
        return None
    return found
