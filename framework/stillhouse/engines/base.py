"""The door for teacher engines: what one has to do, and what all of them share.

Shapes: S sequences of a chunk, L positions, T target tokens of a part, B bytes of a record.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from stillhouse.config import TeacherSection
from stillhouse.engines.probe import Probe
from stillhouse.logits import Backend, CompressedLogits, TargetSpec, encode, token_seeds
from stillhouse.models import ModelIdentity
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Recipe

_SAMPLE_TOKENS = 64  # of each part, to measure what compression and codec cost


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What targets an engine can make."""

    most_entries: int | None = None  # exact entries a token; None: as many as the vocabulary has
    draws: bool = True  # from the tail


class Records(NamedTuple):
    """The targets of some tokens as they are stored, and a sample of them to measure what storing
    loses."""

    records_TB: Tensor  # uint8, on the engine's device
    sample: CompressedLogits  # of the first tokens, before they were encoded


class TeacherEngine(Protocol):
    """Anything that knows the next-token distribution after each masked-in token. One process has
    one, and keeps nothing between items."""

    def __init__(self, section: TeacherSection, recipe: Recipe, *, device: str) -> None:
        """Load the teacher. Raises ModelError or TeacherError for one that cannot be used."""

    @property
    def digest(self) -> str | None:
        """Of the files that it loaded, as `identity` counts it; None where the recipe's digest
        names what cannot change."""
        ...

    @classmethod
    def describe(cls, section: TeacherSection, /) -> Capabilities:
        """From the config alone: nothing is loaded. A recipe that wants more is refused before
        anything starts."""
        ...

    @classmethod
    def identity(cls, section: TeacherSection, *, cache_dir: Path) -> ModelIdentity:
        """What the teacher is, for the recipe: the same digest, the same distributions."""
        ...

    def records(self, item: WorkItem) -> Iterator[Records]:
        """The targets of the item's masked-in positions in row-major order, a part at a time; where
        there are none, a part without rows."""
        ...

    def probe(self) -> Probe:
        """The answer to `probe_item`, and what tells this replica from another one."""
        ...

    def backend(self) -> Backend:
        """How logits become targets here, and why, for people to read."""
        ...


def encoded(parts: Iterable[CompressedLogits], spec: TargetSpec) -> Iterator[Records]:
    """For an engine whose targets are tensors of this process: they are encoded where they lie."""
    for targets in parts:
        yield Records(encode(targets, spec), targets.map(_first))


def _first(rows: Tensor) -> Tensor:
    return rows[:_SAMPLE_TOKENS].clone()  # a view would keep all of them alive


def draw_seeds(item: WorkItem, recipe: Recipe) -> torch.Tensor:
    """int64 [S, L]: the seed of each position's draws, a function of the recipe and the position's
    place in the corpus alone."""
    num_sequences, length = item.sequences.token_ids_SL.shape
    sequences_S = item.number * recipe.chunk_sequences + torch.arange(num_sequences)
    seeds = token_seeds(
        recipe.draw_seed,
        sequences_S.repeat_interleave(length),
        torch.arange(length).repeat(num_sequences),
    )
    return seeds.view(num_sequences, length)


def probe_item(recipe: Recipe, *, num_tokens: int = 64) -> WorkItem:
    """The same short pseudo-random sequence for every replica of a recipe."""
    length = min(num_tokens, recipe.sequence_length)
    token_ids = np.random.default_rng(0).integers(
        0, recipe.vocab_size, size=(1, length), dtype=np.int32
    )
    mask = np.ones((1, length), dtype=np.uint8)
    mask[:, -1] = 0
    return WorkItem(-1, Sequences(token_ids, np.arange(length, dtype=np.int32)[None], mask))
