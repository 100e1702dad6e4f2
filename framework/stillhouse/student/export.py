"""Export: a committed checkpoint as a plain Hugging Face directory, which
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
    step: int | None = None,
    patience: Patience = DEFAULT_PATIENCE,
) -> int:
    """Write the newest commit of `checkpoints`, or that of `step`, to `out`: safetensors in the
    student's dtype, config, tokenizer and model card. Returns the optimiser steps behind the
    weights.

    `card(steps)` is the text of the card. Waits while the store is unavailable, and reports that to
    `tell`. Raises CheckpointError where there is no commit, or its weights do not fit the model;
    ConfigError where `out` cannot be written; StoreUnavailable at the end of the patience.
    """
    model, steps = load_trained(checkpoints, section, step=step, tell=tell, patience=patience)
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
    checkpoints: str,
    section: StudentSection,
    *,
    tell: Tell,
    step: int | None = None,
    patience: Patience = DEFAULT_PATIENCE,
) -> tuple[PreTrainedModel, int]:
    """The model of the newest commit, or of that of `step`, on the CPU and in the student's dtype,
    and the optimiser steps behind it. Waits and raises as `export` does."""
    # the weights
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
    # in a model of the student's architecture
    model = load_model(section, random_init_seed=0)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = sorted(set(missing) - set(model.all_tied_weights_keys))
    if unexpected or missing:
        raise CheckpointError(
            f"the checkpoint of step {found.step} does not fit {section.model}: missing "
            f"{missing[:4]}, unexpected {list(unexpected)[:4]}; was student.model changed?"
        )
    model.tie_weights()
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
