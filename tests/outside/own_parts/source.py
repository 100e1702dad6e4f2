"""A source: sums in decimal digits, made up as they are asked for. Nothing is prepared and nothing
is stored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.config import CorpusSection
from stillhouse.sequence import Sequences
from stillhouse.sequences.source import Identity, Sources

_NUM_TRAIN, _NUM_HELDOUT = 96, 8


@dataclass(frozen=True)
class Sums:
    """Sequence s is a sum that s decides."""

    tokenizer: Any
    sequence_length: int
    block_sequences: int
    numbers: range

    @property
    def identity(self) -> Identity:
        return Identity("sums", f"{self.numbers.start}-{self.numbers.stop}x{self.sequence_length}")

    @property
    def num_blocks(self) -> int:
        return -(-self.num_sequences // self.block_sequences)

    @property
    def num_sequences(self) -> int:
        return len(self.numbers)

    @property
    def num_targets(self) -> int:
        return sum(self.block(number).num_targets for number in range(self.num_blocks))

    def block(self, number: int) -> Sequences:
        chosen = self.numbers[number * self.block_sequences : (number + 1) * self.block_sequences]
        ids_SL = np.zeros((len(chosen), self.sequence_length), np.int32)
        mask_SL = np.zeros((len(chosen), self.sequence_length), np.uint8)
        for row, seed in enumerate(chosen):
            a, b = np.random.default_rng(seed).integers(0, 10**6, 2).tolist()
            ids = self.tokenizer(f"{a} + {b} = {a + b}\n").input_ids[: self.sequence_length]
            ids_SL[row, : len(ids)] = ids
            mask_SL[row, : len(ids) - 1] = 1
        positions_SL = np.broadcast_to(
            np.arange(self.sequence_length, dtype=np.int32), ids_SL.shape
        ).copy()
        return Sequences(ids_SL, positions_SL, mask_SL)


def sums(
    section: CorpusSection, tokenizer: Any, *, block_sequences: int, cache_dir: Path
) -> Sources:
    del cache_dir
    train, heldout = range(_NUM_TRAIN), range(_NUM_TRAIN, _NUM_TRAIN + _NUM_HELDOUT)
    return Sources(
        *(
            Sums(tokenizer, section.sequence_length, block_sequences, numbers)
            for numbers in (train, heldout)
        )
    )
