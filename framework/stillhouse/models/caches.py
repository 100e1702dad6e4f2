"""The cache of a model that writes one token after the other: keys and values of attention, states
of other layers.

Shapes: B sequences side by side, P tokens of the longest of them, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stillhouse.errors import ModelError
from stillhouse.models.heads import PACKING_TOLERANCE

_OF_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True, slots=True)
class WritersCache:
    """The cache of one batch of sequences, empty at first."""

    cache: DynamicCache
    argument: str  # by which the model takes it: another one in newer versions of transformers

    @classmethod
    def of(cls, model: PreTrainedModel) -> "WritersCache":
        takes = inspect.signature(model.forward).parameters
        name = "cache" if "cache" in takes else "past_key_values"
        return cls(DynamicCache(config=model.config), name)

    @property
    def can_shrink(self) -> bool:
        """Whether sequences can be left out: the states of layers without attention stay."""
        return all(type(layer) in _OF_ATTENTION for layer in self.cache.layers)

    def keep(self, rows: Tensor) -> None:
        """Leave out all sequences but these."""
        self.cache.batch_select_indices(rows)


def next_logits(
    model: PreTrainedModel,
    ids_BP: Tensor,
    positions_BP: Tensor,
    mask_BP: Tensor,
    cache: WritersCache,
) -> Tensor:
    """[B, V]: the logits after the last of these tokens, which follow those in the cache. The mask
    is of all tokens so far: 0 where one is padding."""
    logits_BPV: Tensor = model(
        input_ids=ids_BP,
        position_ids=positions_BP,
        attention_mask=mask_BP,
        use_cache=True,
        logits_to_keep=1,
        **{cache.argument: cache.cache},
    ).logits
    return logits_BPV[:, -1]


def left_padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of int64 side by side, [B, P]: their ids, positions, and a mask that is 0 at the
    padding before a shorter one."""
    length = max(len(each) for each in sequences)
    ids_BP = torch.zeros(len(sequences), length, dtype=torch.long)
    mask_BP = torch.zeros_like(ids_BP)
    for row, each in enumerate(sequences):
        ids_BP[row, length - len(each) :] = each
        mask_BP[row, length - len(each) :] = 1
    return ids_BP, (mask_BP.cumsum(1) - 1).clamp_min(0), mask_BP


@torch.inference_mode()
def check_cache(model: PreTrainedModel, *, vocab_size: int) -> None:
    """Raise ModelError unless sequences of other lengths, written side by side with a cache, have
    the logits that each of them has alone without one."""
    # two sequences, the last tokens of which are taken one after the other
    ids_BL = torch.randint(0, vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    begins, steps, differences = (7, 12), 4, []
    cache, device = WritersCache.of(model), model.device
    ids_BP, positions_BP, mask_BP = (
        each.to(device) for each in left_padded([ids_BL[row, :n] for row, n in enumerate(begins)])
    )
    for step in range(steps):
        found_BV = next_logits(model, ids_BP, positions_BP, mask_BP, cache)
        for row, begin in enumerate(begins):
            alone_LV = model(input_ids=ids_BL[row : row + 1, : begin + step].to(device)).logits[0]
            change_V = found_BV[row].float() - alone_LV[-1].float()
            differences.append(float(change_V.norm() / alone_LV[-1].float().norm()))
        taken = [ids_BL[row, begin + step] for row, begin in enumerate(begins)]
        ids_BP = torch.stack(taken)[:, None].to(device)
        positions_BP = positions_BP[:, -1:] + 1
        mask_BP = torch.cat([mask_BP, torch.ones_like(ids_BP)], dim=1)

    # the median: in a mixture of experts a token may go to another one, by rounding
    found, allowed = sorted(differences)[len(differences) // 2], PACKING_TOLERANCE[model.dtype]
    if not found <= allowed:
        raise ModelError(
            f"{type(model).__name__} does not write as it reads: with its cache, its logits are "
            f"{found:.2g} of their norm from those without (allowed: {allowed:.2g}); use another "
            "architecture to write with"
        )
