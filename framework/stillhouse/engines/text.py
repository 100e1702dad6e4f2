"""`TextEngine`: no model; the target after a token is the next token of the text itself, with
probability 1. Cross-entropy learns it: sequence-level distillation, where a larger model wrote the
text (Kim and Rush 2016, arXiv 1606.07947).

Shapes: T target tokens.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from stillhouse.config import TeacherSection
from stillhouse.engines.base import Capabilities, Records, encoded, probe_item, require_no_gpu
from stillhouse.engines.probe import Probe
from stillhouse.logits import Backend, CompressedLogits
from stillhouse.models.identity import ModelIdentity
from stillhouse.sequence import WorkItem
from stillhouse.store import Recipe
from stillhouse.store.recipe import canonical_json

_RULE = {"target": "next token"}  # whose digest is the teacher's: see docs/format.md


class TextEngine:
    """A teacher without weights. Loads nothing, and runs on the CPU."""

    digest: str | None = None  # nothing is loaded

    def __init__(
        self, section: TeacherSection, recipe: Recipe, *, device: str, store_url: str = ""
    ) -> None:
        del section, device, store_url  # all that it needs is in the recipe and in each item
        self._recipe = recipe

    @classmethod
    def describe(cls, section: TeacherSection, /) -> Capabilities:
        require_no_gpu(section)
        return Capabilities(most_entries=1, draws=False, temperatures=False)

    @classmethod
    def identity(cls, section: TeacherSection, *, cache_dir: Path) -> ModelIdentity:
        """Of the rule alone: the sequences and the tokenizer are in the recipe already."""
        del cache_dir  # nothing is computed
        digest = hashlib.sha256(canonical_json(_RULE)).hexdigest()
        return ModelIdentity(digest, section.revision, kind="text")

    def records(self, item: WorkItem) -> Iterator[Records]:
        return encoded([self.targets(item)], self._recipe.spec)

    def targets(self, item: WorkItem) -> CompressedLogits:
        """Targets of one entry as tensors on the CPU: the label, with log-probability 0. The tail
        is empty."""
        ids_T1 = torch.from_numpy(item.sequences.labels)[:, None]
        return CompressedLogits(
            ids_T1,
            torch.zeros(ids_T1.shape),
            torch.full((len(ids_T1),), -torch.inf),
            ids_T1[:, :0],
            vocab_size=self._recipe.vocab_size,
        )

    def probe(self) -> Probe:
        return Probe(self.targets(probe_item(self._recipe)), rounding_kl=0.0, weight_hashes={})

    def backend(self) -> Backend:
        return Backend("text", "the target is the next token of the text")
