"""`TeacherEngine`: the protocol for what runs a teacher, and functions that engines share.

Shapes: S sequences of a chunk, L positions, T target tokens of a part, B bytes of a record.

`TransformersEngine` (`engines/transformers.py`) is the example to read.
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
from stillhouse.errors import ConfigError
from stillhouse.logits import Backend, CompressedLogits, TargetSpec, encode, token_seeds
from stillhouse.models.identity import ModelIdentity
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Recipe

SAMPLE_TOKENS = 64  # of each part: kept unencoded, to measure what compression and codec lose
# Kept by the probe, whatever the recipe keeps: the few likeliest entries of a flat distribution may
# agree in models that differ.
_PROBE_ENTRIES = 128


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The targets that an engine can make."""

    most_entries: int | None = None  # exact entries a token; None: up to the whole vocabulary
    draws: bool = True  # whether it can draw from the tail
    # whether it can give each draw its log-probability, and keep those of labels and the entropy of
    # the tail; an engine that hands `spec`, seeds and labels to `compress` can
    weighted_draws: bool = False
    label_logprob: bool = False
    tail_entropy: bool = False
    temperatures: bool = True  # whether it can score at another temperature than 1


class Records(NamedTuple):
    """The targets of one part of an item, as they are stored, and a sample to measure the loss."""

    records_TB: Tensor  # uint8, on the engine's device
    sample: CompressedLogits  # the first tokens before encoding


class TeacherEngine(Protocol):
    """Computes the teacher's next-token distribution after every position whose loss mask is 1.

    One instance in each actor's process. Stateless between items: the process can be killed at any
    time.
    """

    def __init__(
        self, section: TeacherSection, recipe: Recipe, *, device: str, store_url: str
    ) -> None:
        """Load the teacher. `store_url`: where chunks will be published. Raises ModelError or
        TeacherError for one that cannot be used."""

    @property
    def digest(self) -> str | None:
        """The digest of the files that were loaded, computed as in `identity`; None where the
        recipe's digest names what cannot change, such as a commit of a hub."""
        ...

    @classmethod
    def describe(cls, section: TeacherSection, /) -> Capabilities:
        """Capabilities, from the config alone: nothing is loaded. A config whose target needs more
        is refused at plan time. Raises ConfigError for a section that the engine cannot follow."""
        ...

    @classmethod
    def identity(cls, section: TeacherSection, *, cache_dir: Path) -> ModelIdentity:
        """The teacher's identity for the recipe: equal digests mean equal distributions."""
        ...

    def records(self, item: WorkItem) -> Iterator[Records]:
        """Targets of the item's positions whose loss mask is 1, in row-major order.

        At least one part; without such positions, one part of no tokens.
        """
        ...

    def probe(self) -> Probe:
        """The answer to `probe_item`, and the weights' hashes, to compare replicas."""
        ...

    def backend(self) -> Backend:
        """The implementation that makes targets of logits here, and the reason, for people."""
        ...


def encoded(parts: Iterable[CompressedLogits], spec: TargetSpec) -> Iterator[Records]:
    """Records of targets that are tensors of this process, encoded on their device."""
    for targets in parts:
        # a clone, since a view would keep the whole part in memory
        sample = targets.map(lambda tensor: tensor[:SAMPLE_TOKENS].clone())
        yield Records(encode(targets, spec), sample)


def require_no_gpu(section: TeacherSection) -> None:
    """Raise ConfigError where an engine without a model is given a GPU."""
    if section.device == "cuda" or section.num_gpus:
        found = (
            'device is "cuda"' if section.device == "cuda" else f"num_gpus is {section.num_gpus:g}"
        )
        raise ConfigError(
            f'teacher.{found}, but the engine "{section.engine}" has no model to run on a GPU; '
            "leave device and num_gpus out"
        )


def draw_seeds(item: WorkItem, recipe: Recipe) -> Tensor:
    """Seeds for the draws of every position, int64 [S, L].

    A function of the recipe and the position's place in the corpus alone.
    """
    num_sequences, length = item.sequences.token_ids_SL.shape
    sequences_S = item.number * recipe.chunk_sequences + torch.arange(num_sequences)
    seeds = token_seeds(
        recipe.draw_seed,
        sequences_S.repeat_interleave(length),
        torch.arange(length).repeat(num_sequences),
    )
    return seeds.view(num_sequences, length)


def probe_spec(recipe: Recipe) -> TargetSpec:
    """What is kept of the answer to `probe_item`: as many entries by every engine."""
    num_entries = min(_PROBE_ENTRIES, recipe.vocab_size)
    return TargetSpec(recipe.vocab_size, num_entries, temperature=recipe.temperature)


def probe_item(recipe: Recipe, *, num_tokens: int = 64) -> WorkItem:
    """A short pseudo-random sequence, the same for every replica of a recipe."""
    length = min(num_tokens, recipe.sequence_length)
    token_ids = np.random.default_rng(0).integers(
        0, recipe.vocab_size, size=(1, length), dtype=np.int32
    )
    mask = np.ones((1, length), dtype=np.uint8)
    mask[:, -1] = 0
    return WorkItem(-1, Sequences(token_ids, np.arange(length, dtype=np.int32)[None], mask))
