"""Where a model comes from, and what to tell its user when it cannot be had."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError

from stillhouse.errors import ModelError


def source_of(model: str) -> str:
    """A local directory, spelt out, or the hub name as it is."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ModelError(f"there is no directory {model}; give that of a saved model, or a hub name such as 'owner/name'")
    return model


def from_hub(load: Callable[[], Any], what: str, model: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise unusable(what, model, error) from error


def unusable(what: str, model: str, error: BaseException) -> ModelError:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        cure = "it is gated: accept its terms on its page, then run `hf auth login` or set HF_TOKEN"
    elif isinstance(error, torch.OutOfMemoryError):
        cure = "give it more GPUs (num_gpus) or a narrower dtype"
    elif Path(model).expanduser().is_dir():
        cure = "check that the directory holds a whole saved model: config.json, *.safetensors and tokenizer.json"
    else:
        cure = (
            "check the name and the revision, or give a local directory; for a private or gated model run `hf auth login` or set HF_TOKEN"
        )
    return ModelError(f"the {what} of {model} cannot be loaded: {str(error).strip() or type(error).__name__}; {cure}")
