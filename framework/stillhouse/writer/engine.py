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
from stillhouse.models.identity import ModelIdentity
from stillhouse.store.rollout_recipe import RolloutRecipe


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What a sample goes on with."""

    number: int  # among all prompts of the recipe
    ids: NDArray[np.int32]
    source: str = ""  # as `Prompts.sources` has it, for a writer behind a server


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What a writer wrote to a prompt: at least one token."""

    ids: NDArray[np.int32]  # the one with which it ended itself included
    # of each, under the distribution that it was drawn from; NaN where a server gives none
    logprobs: NDArray[np.float32]
    ended: bool  # False: it was cut at max_new_tokens
    # where a server gives them: the likeliest in the place of each, in the form of `store.rollouts`
    top_logprobs_NK: NDArray[np.float32] | None = None
    top_ids_NK: NDArray[np.int32] | None = None


class WriterEngine(Protocol):
    """Writes samples to prompts.

    Construction, in the process of an actor, loads the model. Two actors that load the same weights
    write the same samples, up to rounding.
    """

    def __init__(
        self, section: WriterSection, recipe: RolloutRecipe, /, *, device: str, store_url: str
    ) -> None:
        """Load the model. `store_url`: where rollouts will be published. Raises ModelError or
        TeacherError for one that cannot be used."""

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

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Sequence[Sample | None]:
        """A sample for each prompt, by the seed at the same place: int64, as `seed_of` gives them.
        None is set aside: nothing was written that can be learnt from."""
        ...
