"""Stillhouse distils large language models at cluster scale, from compressed top-k targets.

The names below are the public ones. Each is imported when it is first used: `import stillhouse`
loads no heavy library.

A run        load_config  plan  run  produce  train  evaluate  export  push
A target     TargetSpec  Head  CompressedLogits  compress  compress_hidden  encode  decode  densify
A loss       distillation_loss  divergence_named  Divergence
A store      ChunkStore  Recipe  list_recipes
Errors       StillhouseError  UserError  RunError
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.api import evaluate, export, plan, produce, push, run, train
    from stillhouse.config import load_config
    from stillhouse.errors import RunError, StillhouseError, UserError
    from stillhouse.logits import (
        CompressedLogits,
        Head,
        TargetSpec,
        compress,
        compress_hidden,
        decode,
        densify,
        encode,
    )
    from stillhouse.losses.distillation import distillation_loss
    from stillhouse.losses.divergences import Divergence, divergence_named
    from stillhouse.store import ChunkStore, Recipe, list_recipes

_MODULES = {
    "stillhouse.api": ("evaluate", "export", "plan", "produce", "push", "run", "train"),
    "stillhouse.config": ("load_config",),
    "stillhouse.errors": ("RunError", "StillhouseError", "UserError"),
    "stillhouse.logits": (
        "CompressedLogits",
        "Head",
        "TargetSpec",
        "compress",
        "compress_hidden",
        "decode",
        "densify",
        "encode",
    ),
    "stillhouse.losses.distillation": ("distillation_loss",),
    "stillhouse.losses.divergences": ("Divergence", "divergence_named"),
    "stillhouse.store": ("ChunkStore", "Recipe", "list_recipes"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ChunkStore",
    "CompressedLogits",
    "Divergence",
    "Head",
    "Recipe",
    "RunError",
    "StillhouseError",
    "TargetSpec",
    "UserError",
    "compress",
    "compress_hidden",
    "decode",
    "densify",
    "distillation_loss",
    "divergence_named",
    "encode",
    "evaluate",
    "export",
    "list_recipes",
    "load_config",
    "plan",
    "produce",
    "push",
    "run",
    "train",
]


if not TYPE_CHECKING:  # a type checker reads the imports above, and refuses unknown names

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'stillhouse' has no attribute '{name}'")
        module = import_module(_HOMES[name])
        globals()[name] = value = getattr(module, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
