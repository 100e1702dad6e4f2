"""DeepSpeed's private interfaces: each private name that is relied on, behind a function whose
docstring gives the reason.

No other file of the package uses a private name of DeepSpeed's. Its version is capped in
pyproject.toml; tests/unit/test_deepspeed_compat.py holds what must be true before the cap is
raised.
"""

import importlib
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


def initialize(**options: Any) -> Any:
    """The engine of `deepspeed.initialize`, without the two compilers that it would load or look
    for.

    `deepspeed.ops.__compatible_ops__` is filled on first use by looking for a C++ compiler, and the
    first engine on a CPU then compiles for a minute.
    """
    deepspeed.ops.__compatible_ops__ = {}
    import_muon()
    engine, *_ = deepspeed.initialize(**options)
    return engine


def import_muon() -> None:
    """Import Muon, as every engine does, with `torch.compile` set aside: its decorators load
    torch's compiler, which takes 0.7 s."""
    compiles = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module(_MUON)
    finally:
        torch.compile = compiles


def save_through(engine: Any, writer: CheckpointEngine) -> None:
    """Make `engine.save_checkpoint` hand all files to the writer, and write none itself: it copies
    scripts into a checkpoint otherwise."""
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda _folder: None


def load(engine: Any, folder: Path, *, universal: bool) -> dict[str, Any] | None:
    """Load a checkpoint, as it is or universal, which DeepSpeed reads from its config alone.
    Returns the client's state in it; None where there was no checkpoint."""
    settings = [dict(group, params=None) for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = universal
    with redirect_stdout(io.StringIO()):  # one of its optimisers prints what it does
        path, state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    engine._config.load_universal_checkpoint = False
    if path is None:
        return None
    if universal:
        _repair(engine.optimizer, settings)
    return dict(state)


def _repair(optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """Undo what DeepSpeed 0.19.8 does wrong as it loads a universal checkpoint at stage 3.

    It gives every group the settings of the first, so that gains would decay like matrices. And it
    gives all states one tensor to count steps in, which would then count each step once for each
    group.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group["weight_decay"] = own["weight_decay"]
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
