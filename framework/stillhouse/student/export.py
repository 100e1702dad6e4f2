"""A committed checkpoint as a plain Hugging Face directory that
`AutoModelForCausalLM.from_pretrained` opens."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.atomic import DISK, FileLayer, whole_directory
from stillhouse.checkpoint.choice import newest_copy
from stillhouse.config import StudentSection
from stillhouse.errors import CheckpointError, ConfigError
from stillhouse.models import load_model
from stillhouse.retry import DEFAULT_PATIENCE, Patience, Tell
from stillhouse.student.weights import consolidated_weights, weight_files


def export(
    checkpoints: str,
    out: Path,
    *,
    section: StudentSection,
    tokenizer: PreTrainedTokenizerBase,
    card: Callable[[int], str],
    tell: Tell,
    patience: Patience = DEFAULT_PATIENCE,
) -> int:
    """Write the newest commit of `checkpoints` to `out`: safetensors in the student's dtype,
    config, tokenizer and model card.

    `card` makes the card of a number of steps; `tell` hears of a store that is waited for. Returns
    the number of optimiser steps behind the weights. Raises CheckpointError where there is no
    commit, or where its weights do not fit the model, ConfigError where `out` cannot be written.
    """
    model, steps = load_trained(checkpoints, section, tell=tell, patience=patience)
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
    """Write a directory that was absent or empty, whole or not at all. Raises ConfigError where it
    cannot be written."""
    try:
        with whole_directory(out.resolve(), files=files) as draft:
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            (draft / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"cannot write the model to {out}: {why}; name a new directory, in one with room that "
            "you may write"
        ) from error


def load_trained(
    checkpoints: str, section: StudentSection, *, tell: Tell, patience: Patience = DEFAULT_PATIENCE
) -> tuple[PreTrainedModel, int]:
    """The model of the newest commit, on the CPU and in the student's dtype, and the optimiser
    steps behind it. Raises as `export` does.

    A store that is unavailable is waited for, as `tell` hears; StoreUnavailable is raised at the
    end of the patience.
    """
    with newest_copy(checkpoints, weight_files, tell=tell, patience=patience) as copy:
        if copy is None:
            raise CheckpointError(
                f"there is no checkpoint under {checkpoints}; train first, with `stillhouse run` "
                "or `stillhouse train`. If that was on"
                " other machines, student.checkpoint_url has to name a place that this one sees, "
                "too"
            )
        found, folder = copy
        weights = consolidated_weights(folder, zero_stage=found.origin.zero_stage)
    model = load_model(section, random_init_seed=0)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise CheckpointError(
            f"the checkpoint of step {found.step} does not fit {section.model}: "
            f"missing {sorted(set(missing) - tied)[:4]}, unexpected {list(unexpected)[:4]}; was "
            "student.model changed?"
        )
    model.tie_weights()
    model.to(getattr(torch, section.dtype))
    return model, found.step


def generation_config_of(section: StudentSection) -> GenerationConfig | None:
    """What the student came with: a chat model's list of end tokens stands there alone. None where
    it came with none that can be saved."""
    try:
        found = GenerationConfig.from_pretrained(section.model, revision=section.revision or "main")
        found.validate(strict=True)
    except (OSError, ValueError):
        return None
    return found
