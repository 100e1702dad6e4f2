"""`WriterEngine`: the protocol for what runs a writer.

`TransformersWriter` (`writer/transformers.py`) is the example to read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.config.generate import WriterSection
from stillhouse.models import ModelIdentity
from stillhouse.store.rollout_recipe import RolloutRecipe


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What a writer wrote to a prompt: at least one token."""

    ids: NDArray[np.int32]  # the one with which it ended itself included
    logprobs: NDArray[np.float32]  # of each, under the distribution that it was drawn from
    ended: bool  # False: it was cut at max_new_tokens


class WriterEngine(Protocol):
    """Writes samples to prompts.

    Construction, in the process of an actor, loads the model. Two actors that load the same weights
    write the same samples, up to rounding.
    """

    def __init__(self, section: WriterSection, recipe: RolloutRecipe, /, *, device: str): ...

    @classmethod
    def identity(cls, section: WriterSection, /, *, cache_dir: Path) -> ModelIdentity:
        """The writer's identity for the recipe: equal digests mean equal distributions."""
        ...

    @property
    def digest(self) -> str | None:
        """Of the files that were loaded, as in `identity`; None where a commit names them."""
        ...

    def weight_hashes(self) -> Mapping[str, int]:
        """A hash of each parameter, by its name: compared between the writers of a pool."""
        ...

    def write(self, prompts: Sequence[NDArray[np.int32]], seeds: Sequence[int]) -> list[Sample]:
        """A sample for each prompt, by the seed at the same place: int64, as `seed_of` gives
        them."""
        ...
