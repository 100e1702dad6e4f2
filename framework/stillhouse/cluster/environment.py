"""What the command knows of the shell that it was typed into: its arguments, and its
environment."""

import logging
import os
import shlex
import sys
from pathlib import Path

from stillhouse.redaction import know, secrets_of


def cache_dir() -> Path:
    """Where tokenised corpora and digests are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"


def learn_secrets() -> None:
    """Keep the secrets that this process was given, by its environment and its user's files, out of
    all that it writes down."""
    know(secrets_of(os.environ, home=Path(os.path.expanduser("~"))))


def quieten() -> None:
    """Settle the libraries before they are imported: what is said here is ours to say, where the
    user's own settings do not win."""
    settings = {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        # unset, it warns at every fork after a tokenizer was used
        "TOKENIZERS_PARALLELISM": "true",
        "WANDB_SILENT": "true",
        # threads that spin at every barrier are eight times slower when another process wants the
        # core
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if not sys.stderr.isatty():
        settings |= dict.fromkeys(
            ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"),
            "1",
        )
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = (
        "0"  # else a thread that calls Ray after its end starts a second cluster
    )
    # a level would be set back by its import
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def forbid_pickled_code() -> None:
    """Have torch run no code of a pickle in this process and all that it starts, whatever the user
    or a caller of torch.load asks for."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # with both, torch opens nothing


def typed() -> str:
    """What the user typed, for the record."""
    return shlex.join(["stillhouse", *sys.argv[1:]])
