"""A writer that is killed once, at a point of its work that is always the same."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse.config.generate import WriterSection
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.writer.engine import Sample
from stillhouse.writer.transformers import TransformersWriter


class MortalWriter(TransformersWriter):
    """Of all writers of a model, the first one that has written a block is killed before it is
    published."""

    def __init__(self, section: WriterSection, recipe: RolloutRecipe, *, device: str):
        super().__init__(section, recipe, device=device)
        self._killed = Path(section.model) / "killed"

    def write(self, prompts: Sequence[NDArray[np.int32]], seeds: Sequence[int]) -> list[Sample]:
        samples = super().write(prompts, seeds)
        try:
            self._killed.touch(exist_ok=False)
        except FileExistsError:
            return samples
        os.kill(os.getpid(), signal.SIGKILL)
        return samples
