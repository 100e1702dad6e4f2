"""Safe unpickling: the pickles of a checkpoint may build tensors and plain values, and call nothing
else.

DeepSpeed has torch run whatever a checkpoint's pickle names (`weights_only=False`), and a checksum
is no signature: a program that can write a file can write its checksum. So every file is opened
here, by torch's restricted unpickler, whatever DeepSpeed and the environment ask for.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from stillhouse.errors import CheckpointError

# all that DeepSpeed's checkpoints hold beside what torch allows by itself
ALLOWED = (LossScaler, ZeroStageEnum, fragment_address)

_torch_load = torch.load
_allow_list_lock = threading.Lock()  # the list belongs to the process
_LONGEST_REASON = 200

_REMEDY = (
    "remove that checkpoint's manifest to use an older one, or the whole directory to start "
    "again from step 0."
)
_STRANGE = (
    "Neither Stillhouse nor the DeepSpeed that it was tried with writes such a file: find "
    f"out who did, then {_REMEDY}"
)


def opened(path: Path | str, map_location: Any = "cpu", *, mmap: bool | None = None) -> Any:
    """The state in a file of a checkpoint. With `map_location="meta"` its tensors have shapes and
    no values, which are not read.

    Raises CheckpointError where the file asks for anything else, cannot be read, or holds a string
    that DeepSpeed would take for a path.
    """
    try:
        with _allow_list_lock, _only_ours_allowed():
            state = _torch_load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # a file from anywhere can fail in any way
        raise CheckpointError(f"{path} was not opened: {_reason(error)}") from None
    outside = _path_in(state)
    if outside is not None:
        raise CheckpointError(
            f"{path} was not used: it names {_shown(outside)}, which is a path. {_STRANGE}"
        )
    return state


@contextmanager
def only_tensors() -> Iterator[None]:
    """While the block lasts, `torch.load` is `opened` for all code of this process, whatever value
    of `weights_only` is passed."""

    def load(path: Any, map_location: Any = None, *, mmap: bool | None = None, **_: Any) -> Any:
        return opened(path, map_location, mmap=mmap)

    before = torch.load
    torch.load = load  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = before


@contextmanager
def _only_ours_allowed() -> Iterator[None]:
    """Sets aside the classes that libraries have allowed for the whole process: some of these do
    more than hold values."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*ALLOWED])
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(others)


def _reason(error: Exception) -> str:
    """One line, with advice of our own: torch's is to open the file in the unsafe way."""
    text = str(error)
    asked = re.search(r"GLOBAL (\S+)", text)
    if asked is not None:
        return (
            f"it wants to use {_shown(asked[1])}, and a checkpoint holds tensors and plain "
            f"values. {_STRANGE}"
        )
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    return f"it cannot be read ({type(error).__name__}: {_shown(first_line)}); {_REMEDY}"


def _shown(text: str) -> str:
    """Text of the file's, fit to be printed."""
    return ascii(text[:_LONGEST_REASON])


def _path_in(state: Any) -> str | None:
    """A string in the state that is a path: DeepSpeed names files after the parameters in it."""
    waiting, seen = [state], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and ("/" in value or value == ".."):
            return value
        if isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value)
            if isinstance(value, dict):
                waiting.extend(dict.values(value))
    return None
