"""Sums of three-digit numbers as prompts, and a writer that adds them digit by digit, by a rule: a
known share of what it writes is right.

    587+645=7+5=12 8+4+1=13 5+6+1=12 1232

Shapes: B samples.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from stillhouse.config.generate import WriterSection
from stillhouse.models.identity import ModelIdentity
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.writer.engine import Prompt, Sample
from stillhouse.writer.sampling import uniforms

SHARE_RIGHT = 0.686  # of the writer's answers
LONGEST_PROMPT, LONGEST_TRACE = 8, 30  # tokens, which are characters, and the end of a text
_LEAST, _NUM_NUMBERS = 100, 900
_DIGITS = 3
# A wrong sum of digits is off by one, which no later step can mend: an answer is right where each
# of its steps is.
_SHARE_OF_WRONG_STEPS = 1 - SHARE_RIGHT ** (1 / _DIGITS)


def write_prompts(path: Path, pairs: Sequence[tuple[int, int]]) -> None:
    """A JSON object of `prompt` and `answer` for each pair of numbers, on a line of its own."""
    rows = ({"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sums(number: int, *, seed: int) -> list[tuple[int, int]]:
    """Pairs of three-digit numbers, none of which repeats another."""
    random = np.random.default_rng(seed)
    places = random.choice(_NUM_NUMBERS**2, size=number, replace=False)
    rows, columns = np.divmod(places, _NUM_NUMBERS)
    return list(zip((_LEAST + rows).tolist(), (_LEAST + columns).tolist(), strict=True))


def trace(a: int, b: int, shifts: Sequence[int]) -> str:
    """The addition, step by step from the last digits on, and the answer. `shifts` are by how much
    each sum of digits is off; 0 is never made less."""
    steps, digits, carry = list[str](), "", 0
    for step, shift in enumerate(shifts):
        x, y = (number // 10**step % 10 for number in (a, b))
        total = x + y + carry
        total += shift if total else abs(shift)
        steps.append(f"{x}+{y}{f'+{carry}' if step else ''}={total}")
        carry, digit = divmod(total, 10)
        digits = f"{digit}{digits}"
    return " ".join([*steps, f"{carry or ''}{digits}"])


class AdditionWriter:
    """Writes out sums. By a sample's seed, each sum of digits is wrong or right.

    It reads the tokenizer of `writer.model`, and no weights.
    """

    def __init__(
        self, section: WriterSection, _recipe: RolloutRecipe, *, device: str, store_url: str
    ) -> None:
        del device, store_url
        self._tokenizer = load_tokenizer(section.model)

    @classmethod
    def identity(cls, _section: WriterSection, *, cache_dir: Path) -> ModelIdentity:
        del cache_dir
        rule = f"{cls.__module__}:{cls.__name__} {SHARE_RIGHT}"
        return ModelIdentity(hashlib.sha256(rule.encode()).hexdigest(), revision=None)

    @property
    def digest(self) -> None:
        """It loads no files that could be others than were planned."""

    def weight_hashes(self) -> Mapping[str, int]:
        return {}

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
        questions = self._tokenizer.batch_decode([prompt.ids.tolist() for prompt in prompts])
        return [
            self._sample(question, shifts)
            for question, shifts in zip(questions, _shifts(seeds), strict=True)
        ]

    def _sample(self, question: str, shifts: Sequence[int]) -> Sample:
        a, b = map(int, question.removesuffix("=").split("+"))
        ids = [*self._tokenizer.encode(trace(a, b, shifts)), self._tokenizer.eos_token_id]
        return Sample(np.array(ids, np.int32), np.zeros(len(ids), np.float32), ended=True)


def _shifts(seeds: Sequence[int]) -> Iterator[list[int]]:
    """Of each sample's steps: 1 or -1 where it is wrong, which are as likely, and else 0."""
    seeds_B = torch.tensor(seeds, dtype=torch.long)
    by_step = torch.stack([uniforms(seeds_B, torch.tensor(step)) for step in range(_DIGITS)], dim=1)
    for of_sample in by_step.tolist():
        yield [
            0 if share >= _SHARE_OF_WRONG_STEPS else 1 if share < _SHARE_OF_WRONG_STEPS / 2 else -1
            for share in of_sample
        ]
