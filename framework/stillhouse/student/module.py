"""A student as a plain PyTorch module: a causal LM whose forward returns the whole loss.

Shapes: T target tokens, H hidden, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.config import StudentSection
from stillhouse.logits import Head
from stillhouse.losses.distillation import LossTerms, distillation_loss
from stillhouse.losses.divergences import divergence_named, forward_kl
from stillhouse.models.batch import hidden_at
from stillhouse.models.heads import head_of
from stillhouse.student.adapters import frozen_names
from stillhouse.student.heldout import HeldoutBatch
from stillhouse.student.loader import MicroBatch


class DistillationHead(nn.Module):
    """The LM head and the loss as one submodule, which owns the head's weight: ZeRO-3 gathers a
    module's parameters for its forward, so that the weight is gathered once for all token
    blocks.

    The divergence is a pure function of the step, so that a resumed training has the same."""

    def __init__(
        self, head: Head, weight: nn.Parameter, bias: nn.Parameter | None, section: StudentSection
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self._head_without_weights = replace(head, weight_VH=torch.empty(0), bias_V=None)
        self._vocab_size = head.vocab_size
        self._divergence = divergence_named(section.divergence, section.mix)
        self._section = section

    def forward(
        self, hidden_TH: Tensor, batch: MicroBatch | HeldoutBatch, step: int
    ) -> LossTerms | Tensor:
        head = replace(
            self._head_without_weights,
            weight_VH=_first_rows(self.weight, self._vocab_size),
            bias_V=None if self.bias is None else _first_rows(self.bias, self._vocab_size),
        )
        if isinstance(batch, HeldoutBatch):
            return batch.score(hidden_TH, head)
        is_near = step >= self._section.forward_kl_steps
        return distillation_loss(
            hidden_TH,
            head,
            batch.target,
            divergence=self._divergence if is_near else forward_kl,
            labels_T=batch.tokens.labels_T,
            ce_weight=self._section.ce_weight,
            divergence_weight=self._section.divergence_weight,
            z_loss_weight=self._section.z_loss_weight,
            block_tokens=self._section.block_tokens,
        )


class StudentModule(nn.Module):
    """A causal LM from a micro-batch, and the number of optimiser steps before it, to its loss; or
    from a held-out batch to its score sums. Only positions that have a target reach the head. Its
    state dict holds no frozen weights."""

    def __init__(self, lm: PreTrainedModel, *, section: StudentSection, vocab_size: int):
        super().__init__()
        self.lm = lm
        output = lm.get_output_embeddings()
        head, bias = head_of(lm, vocab_size=vocab_size), getattr(output, "bias", None)
        self.head = DistillationHead(head, output.weight, bias, section)
        nn.Module.register_state_dict_post_hook(self, _leave_out_frozen)
        nn.Module.register_load_state_dict_post_hook(self, _miss_no_frozen)

    def forward(self, batch: MicroBatch | HeldoutBatch, *, step: int) -> LossTerms | Tensor:
        found: LossTerms | Tensor = self.head(hidden_at(self.lm, batch.tokens), batch, step)
        return found


def checkpoint_activations(lm: PreTrainedModel, *, every: int) -> None:
    """Compute the activations of one in `every` layers again in the backward pass."""
    # Transformers has renamed the method between 5.17 and 5.23
    name = "activation_checkpointing_enable"
    enable = getattr(lm, name, None) or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False}, every_n_layers=every)


def _first_rows(parameter: nn.Parameter, num_rows: int) -> Tensor:
    """The first rows; the parameter itself where it has no more, since the gradient of a slice is
    copied into one of the whole."""
    return parameter if parameter.shape[0] == num_rows else parameter[:num_rows]


def _leave_out_frozen(
    module: nn.Module, state: dict[str, Any], _prefix: str, _metadata: object
) -> None:
    for name in frozen_names(module):
        # with what Linear4bit adds: the scales of a quantised weight, by names below the weight's
        for each in [key for key in state if key == name or key.startswith(f"{name}.")]:
            del state[each]


def _miss_no_frozen(module: nn.Module, keys: Any) -> None:
    frozen = frozen_names(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]
