"""Errors of models that cannot be loaded, from the hub or a directory, and what to do."""

from collections.abc import Callable
from pathlib import Path
from socket import gaierror
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from stillhouse.errors import ModelError
from stillhouse.model_path import where_it_was_looked_for

# what to do about a teacher that is too large for one GPU
SEVERAL_GPUS = (
    'in [teacher] write engine = "vllm" and num_gpus = {num_gpus}, which computes on all of them '
    "at once (tensor parallel); or pipeline = true and num_gpus = {num_gpus}, which spreads the "
    "layers over them: one works at a time, so each does 1/{num_gpus} of what it could"
)

_ABSENT = (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)
_NO_ANSWER = (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    ConnectionError,
    TimeoutError,
    gaierror,
)


def from_hub(load: Callable[[], Any], what: str, model: str) -> Any:
    """What `load` returns. Raises ModelError in place of the errors of Hugging Face's libraries."""
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise unusable(what, model, error) from error


def unusable(what: str, model: str, error: BaseException) -> ModelError:
    """The error to raise where `what` of a model (its config, its tokenizer) cannot be loaded."""
    # The chain of errors, in which the reason may be deep.
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)

    def is_due_to(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    # What to do about it.
    instead = f"give a local directory: there is no {model}{where_it_was_looked_for(model)}"
    if is_due_to(GatedRepoError):
        cure = "it is gated: accept its terms on its page, then run `hf auth login` or set HF_TOKEN"
    elif isinstance(error, torch.OutOfMemoryError):
        cure = f"take a narrower dtype; or {SEVERAL_GPUS.format(num_gpus=2)}"
    elif Path(model).expanduser().is_dir():
        cure = (
            "check that the directory holds a whole saved model: config.json, *.safetensors "
            "and tokenizer.json"
        )
    elif is_due_to(*_NO_ANSWER) and not is_due_to(*_ABSENT):
        cure = (
            "the hub was not reached, and the cache has no copy: check the network, a proxy's "
            f"settings and HF_HUB_OFFLINE, or {instead}"
        )
    else:
        cure = (
            f"check the name and the revision, or {instead}; for a private or gated model run "
            "`hf auth login` or set HF_TOKEN"
        )
    return ModelError(
        f"the {what} of {model} cannot be loaded: {str(error).strip() or type(error).__name__}; "
        f"{cure}"
    )
