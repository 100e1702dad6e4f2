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
    """Settle the libraries before they are imported: what is said here is ours to say, where the user's own settings do not win."""
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
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a thread that calls Ray after its end starts a second cluster
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # a level would be set back by its import


def typed() -> str:
    """What the user typed, for the record."""
    return shlex.join(["stillhouse", *sys.argv[1:]])
