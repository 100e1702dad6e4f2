"""What the command knows of the shell that it was typed into: its arguments, and its environment."""

import logging
import os
import shlex
import sys
from pathlib import Path


def cache_dir() -> Path:
    """Where tokenised corpora and digests are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"


def quieten() -> None:
    """Settle the libraries' chatter before they are imported: what is said here is ours to say. The user's own settings win."""
    settings = {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",  # unset, it warns at every fork after a tokenizer was used
        "WANDB_SILENT": "true",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin at every barrier are eight times slower when another process wants the core
    }
    if not sys.stderr.isatty():
        settings |= dict.fromkeys(("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"), "1")
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # a level would be set back by its import


def forbid_pickled_code() -> None:
    """Have torch run no code of a pickle in this process and all that it starts, whatever the user or a caller of torch.load asks for."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # with both, torch opens nothing


def typed() -> str:
    """What the user typed, for the record."""
    return shlex.join(["stillhouse", *sys.argv[1:]])
