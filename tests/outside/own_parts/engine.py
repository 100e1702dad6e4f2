"""An engine: a causal LM that is asked for the plain logits of one document at a time.

Shapes: D tokens of a document, T target tokens of it, V vocabulary.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from stillhouse.config import TeacherSection
from stillhouse.engines.base import Capabilities, Records, draw_seeds, encoded, probe_item
from stillhouse.engines.probe import Probe
from stillhouse.logits import Backend, CompressedLogits, compress, concatenate
from stillhouse.models.identity import ModelIdentity
from stillhouse.sequence import WorkItem
from stillhouse.store import Recipe


class PlainEngine:
    """Slow and short: no packing, no fused head, no batches."""

    def __init__(
        self, section: TeacherSection, recipe: Recipe, *, device: str, store_url: str
    ) -> None:
        del store_url  # nothing is kept
        self._recipe, self._device = recipe, device
        model: Any = AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32)
        self._model = model.to(device).eval()
        self.digest = None

    @classmethod
    def describe(cls, _section: TeacherSection, /) -> Capabilities:
        return Capabilities()

    @classmethod
    def identity(cls, section: TeacherSection, *, cache_dir: Path) -> ModelIdentity:
        del cache_dir  # the file is small
        weights = Path(section.model, "model.safetensors").read_bytes()
        return ModelIdentity(hashlib.sha256(b"plain" + weights).hexdigest(), revision=None)

    def records(self, item: WorkItem) -> Iterator[Records]:
        return encoded(self._targets(item), self._recipe.spec)

    def probe(self) -> Probe:
        return Probe(
            concatenate([*self._targets(probe_item(self._recipe))]),
            rounding_kl=0.0,
            weight_hashes={},
        )

    def backend(self) -> Backend:
        return Backend("plain", "one document at a time")

    @torch.inference_mode()
    def _targets(self, item: WorkItem) -> Iterator[CompressedLogits]:
        seeds_SL = draw_seeds(item, self._recipe)
        for row, (ids_L, positions_L, mask_L) in enumerate(
            zip(*item.sequences.arrays, strict=True)
        ):
            starts = np.flatnonzero(positions_L == 0).tolist()
            for start, stop in zip(starts, [*starts[1:], len(ids_L)], strict=True):
                ids_D = torch.from_numpy(ids_L[start:stop].astype(np.int64)).to(self._device)
                logits_DV = self._model(ids_D[None]).logits[0, :, : self._recipe.vocab_size]
                target_positions_T = np.flatnonzero(mask_L[start:stop])
                yield compress(
                    logits_DV[target_positions_T],
                    self._recipe.spec,
                    seeds_T=seeds_SL[row, start:stop][target_positions_T],
                )
