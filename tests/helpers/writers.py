"""A writer that is killed once, at a point of its work that is always the same; and a pupil, who
adds."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stillhouse.config.generate import WriterSection
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.writer.engine import Prompt, Sample
from stillhouse.writer.transformers import TransformersWriter


class MortalWriter(TransformersWriter):
    """Of all writers of a model, the first one that has written a block is killed before it is
    published."""

    def __init__(
        self, section: WriterSection, recipe: RolloutRecipe, *, device: str, store_url: str = ""
    ):
        super().__init__(section, recipe, device=device, store_url=store_url)
        self._killed = Path(section.model) / "killed"

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
        samples = super().write(prompts, seeds)
        try:
            self._killed.touch(exist_ok=False)
        except FileExistsError:
            return samples
        os.kill(os.getpid(), signal.SIGKILL)
        return samples


class Pupil(TransformersWriter):
    """Answers questions such as "12+34=". By its seed an answer is wrong, or is cut before its
    end."""

    def __init__(
        self, section: WriterSection, _recipe: RolloutRecipe, *, device: str, store_url: str = ""
    ):
        del store_url
        assert device == "cpu"
        self._tokenizer = load_tokenizer(section.model)

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
        return [self._answer(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _answer(self, prompt: Prompt, seed: int) -> Sample:
        question = str(self._tokenizer.decode(prompt.ids.tolist())).rstrip("=")
        total = sum(map(int, question.split("+")))
        is_wrong, is_cut = seed % 3 == 0, seed % 5 == 0
        ids = self._tokenizer.encode(f"that is {total + is_wrong}")
        ids += [] if is_cut else [self._tokenizer.eos_token_id]
        return Sample(np.array(ids, np.int32), np.zeros(len(ids), np.float32), ended=not is_cut)
