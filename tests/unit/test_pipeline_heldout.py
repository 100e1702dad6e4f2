"""Which held-out text students are scored on while they learn, and what a run without any is
told."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest

from stillhouse.errors import ConfigError
from stillhouse.pipeline.heldout import first_sequences
from stillhouse.pipeline.plan import require_heldout
from stillhouse.sequence import Sequences
from stillhouse.sequences.source import Identity

LENGTH = 8


@dataclass(frozen=True)
class Held:
    """A source whose sequences have these numbers of targets; sequence i has the id i."""

    counts: list[int]
    block_sequences: int

    @property
    def identity(self) -> Identity:
        return Identity("held", "0f")

    @property
    def num_blocks(self) -> int:
        return -(-len(self.counts) // self.block_sequences)

    @property
    def num_sequences(self) -> int:
        return len(self.counts)

    @property
    def num_targets(self) -> int:
        return sum(self.counts)

    @property
    def sequence_length(self) -> int:
        return LENGTH

    @cached_property
    def whole(self) -> Sequences:
        shape = (len(self.counts), LENGTH)
        ids_SL = np.broadcast_to(np.arange(len(self.counts), dtype=np.int32)[:, None], shape)
        mask_SL = (np.arange(LENGTH) < np.array(self.counts)[:, None]).astype(np.uint8)
        return Sequences(ids_SL, np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape), mask_SL)

    def block(self, number: int) -> Sequences:
        first = number * self.block_sequences
        return self.whole.select(slice(first, first + self.block_sequences))


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [(1, 1), (4, 1), (5, 3), (7, 3), (8, 4), (11, 5), (12, 5), (13, 5), (10**9, 5)],
)
@pytest.mark.parametrize("block_sequences", [1, 2, 3, 9])
def test_the_first_sequences_with_enough_targets_are_scored(
    wanted: int, rows: int, block_sequences: int
) -> None:
    found = first_sequences(Held([4, 0, 3, 3, 2], block_sequences), num_targets=wanted)
    assert found.token_ids_SL[:, 0].tolist() == list(range(rows))


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_a_run_without_held_out_text_is_refused_in_words(counts: list[int]) -> None:
    with pytest.raises(
        ConfigError, match=rf"has {len(counts)} sequences and 0 target tokens, wanted at least one"
    ):
        require_heldout(Held(counts, 2))
    require_heldout(Held([0, 1], 2))
