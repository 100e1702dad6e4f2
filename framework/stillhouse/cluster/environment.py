"""The environment of this process: variables that are read and set, secrets that must not be
written down, and the command line."""

import logging
import os
import shlex
import sys
from pathlib import Path

from stillhouse.redaction import know, secrets_of


def cache_dir() -> Path:
    """The directory of tokenised corpora and digests, which runs share."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"


def learn_secrets() -> None:
    """Register the secrets in this process's environment and in its user's files for redaction."""
    know(secrets_of(os.environ, home=Path(os.path.expanduser("~"))))


def secret_in(variable: str) -> str | None:
    """The secret in a variable of this process's environment, registered for redaction; None where
    there is none."""
    value = os.environ.get(variable, "").strip()
    know([value])
    return value or None


def quieten() -> None:
    """Set how the libraries log and wait, before they are imported. The user's own settings
    stay."""
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
    # otherwise a thread that calls Ray after its end starts a second cluster
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    # a filter, because DeepSpeed's import sets its level
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def forbid_pickled_code() -> None:
    """Make torch.load run no code of a pickle (`weights_only`), in this process and in all that it
    starts, whatever its caller or the user sets."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # with both, torch loads nothing


def typed() -> str:
    """The command line as the user typed it, for the journal."""
    return shlex.join(["stillhouse", *sys.argv[1:]])
