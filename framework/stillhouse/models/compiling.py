"""Layers of a model compiled by torch.compile, for documents of any number and length.

A layer is compiled in parts, before and behind its attention. Attention by document is left as it
is (a graph break), since it calls a kernel, or one function a document. Layers of one kind share
their compiled parts, so the time that this takes does not grow with the number of layers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from stillhouse.errors import ModelError
from stillhouse.models import _torch_compat
from stillhouse.models.attention import NAME, by_document
from stillhouse.models.heads import PACKING_TOLERANCE, final_hidden

Backend: TypeAlias = str | Callable[..., Any]
_LEFT_OUT = "attention by document is called as it is"
_LENGTHS = ((5, 11), (3, 2, 7))  # of the documents of each row of the check


def compile_layers(model: PreTrainedModel, *, backend: Backend = "inductor") -> None:
    """Have the layers of a model compiled when they are first called. `backend` is torch.compile's.

    Raises ModelError for a model whose layers cannot be told from its other parts.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers of the class GradientCheckpointingLayer of "
            "transformers, which alone can be compiled; set compile = false"
        )
    AttentionInterface.register(NAME, torch.compiler.disable(by_document, reason=_LEFT_OUT))
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def as_written() -> AbstractContextManager[Any]:
    """A context in which compiled layers are called as they are written (eager)."""
    context: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return context


def check_compiled(model: PreTrainedModel, *, vocab_size: int) -> None:
    """Compile the layers now, and their backward pass, too, where gradients are recorded.

    Raises ModelError where that fails, where another part than attention is left out of it, and
    where the hidden states differ from those of the layers as they are written.
    """
    name, before = type(model).__name__, _torch_compat.graph_breaks()
    generator = torch.Generator().manual_seed(0)
    for lengths in _LENGTHS:
        # both ways
        ids_1L = torch.randint(vocab_size, (1, sum(lengths)), generator=generator)
        positions_1L = torch.cat([torch.arange(length) for length in lengths])[None]
        with as_written():
            wanted_1LH = final_hidden(model, ids_1L, positions_1L)
        try:
            found_1LH = final_hidden(model, ids_1L, positions_1L)
            if found_1LH.requires_grad:
                # of the first weight alone, to which a gradient comes through all layers
                first = next(weight for weight in model.parameters() if weight.requires_grad)
                torch.autograd.grad(found_1LH.float().sum(), first)
        except Exception as error:  # of any compiler
            raise ModelError(
                f"the layers of {name} cannot be compiled here: {_shortened(str(error))}; set "
                "compile = false, or install the compiler that it asks for"
            ) from error
        # nothing else may be left out, nor anything be changed
        _require_same(name, found_1LH.detach(), wanted_1LH.detach())
        breaks = _torch_compat.graph_breaks() - before
        others = [why for why in breaks if _LEFT_OUT not in why]
        if others:
            raise ModelError(
                f"the layers of {name} can be compiled only in part: {_shortened(others[0])}; set "
                "compile = false"
            )


def _require_same(name: str, found_1LH: Tensor, wanted_1LH: Tensor) -> None:
    difference_1LH = (found_1LH - wanted_1LH).float()
    largest = float((difference_1LH.norm(dim=-1) / wanted_1LH.float().norm(dim=-1)).max())
    allowed = PACKING_TOLERANCE[wanted_1LH.dtype]
    if not largest <= allowed:
        raise ModelError(
            f"the compiled layers of {name} give other hidden states: they are {largest:.2g} of "
            f"their norm apart (allowed: {allowed:.2g}); set compile = false"
        )


def _shortened(words: str) -> str:
    """The first two lines of an error of torch.compile, which say what it is; behind them is advice
    for those who develop torch."""
    return " ".join(line.strip() for line in words.strip().splitlines()[:2])
