"""What ranks score a student with while it learns: a file that is read as it was written, or
refused, and parts of ranks that add up to the whole.

Shapes: S sequences, L positions, T target tokens, H hidden, V vocabulary.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.chunks import make_chunk, small_recipe
from helpers.training import refuse_outage
from stillhouse.errors import StudentError
from stillhouse.logits import Head
from stillhouse.losses.score import head_logprobs, no_sums, score_sums, scores_of
from stillhouse.sequence import Sequences
from stillhouse.store.object_store import Blobs
from stillhouse.student.heldout import HeldoutTeacher, read_heldout, write_heldout

RECIPE = small_recipe(num_sequences=5, sequence_length=24, chunk_sequences=5)
V, KEY = RECIPE.vocab_size, "heldout/0f0f.safetensors"


def teacher_of(dtype: torch.dtype) -> HeldoutTeacher:
    sequences = make_chunk(RECIPE).sequences
    random = torch.Generator().manual_seed(0)
    hidden_TG = torch.randn((sequences.num_targets, 12), generator=random).to(dtype)
    weight_VG = torch.randn((V + 3, 12), generator=random).to(dtype)
    bias_V = torch.randn(V, generator=random).to(dtype)
    return HeldoutTeacher(sequences, hidden_TG, Head(weight_VG[:V], bias_V, scale=0.7, softcap=9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher, blobs = teacher_of(dtype), Blobs(str(tmp_path))
    write_heldout(blobs, KEY, teacher)
    found = read_heldout(blobs, KEY, tell=refuse_outage)
    for ours, theirs in zip(found.sequences.arrays, teacher.sequences.arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.hidden_TG.dtype == dtype
    assert torch.equal(found.head.logits(found.hidden_TG), teacher.head.logits(teacher.hidden_TG))


def test_a_flipped_bit_a_cut_and_an_absent_file_are_refused_by_name(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path))
    with pytest.raises(StudentError, match=r"0f0f.* is absent; remove it and give the same"):
        read_heldout(blobs, KEY, tell=refuse_outage)
    write_heldout(blobs, KEY, teacher_of(torch.float32))
    whole = (tmp_path / KEY).read_bytes()
    flips = [3, 60, *range(200, len(whole), 997)]
    damaged = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in flips]
    for data in [*damaged, whole[:-1], whole[:50], b""]:
        (tmp_path / KEY).write_bytes(data)
        with pytest.raises(StudentError, match=r"0f0f.* is damaged"):
            read_heldout(blobs, KEY, tell=refuse_outage)


@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (2, 2), (3, 1), (7, 3)])
def test_the_parts_of_all_ranks_are_the_whole(world_size: int, size: int) -> None:
    """A student that gives every token the same hidden state; one rank has blanks alone."""
    teacher = teacher_of(torch.float32)
    student = Head(torch.randn((V, 6), generator=torch.Generator().manual_seed(1)))

    def sums_of(*, rank: int, world_size: int, size: int) -> tuple[torch.Tensor, int]:
        batches = teacher.batches(rank=rank, world_size=world_size, size=size, block_tokens=7)
        parts = [batch.score(torch.ones(batch.tokens.num_targets, 6), student) for batch in batches]
        return sum(parts, start=no_sums()), len(batches)

    parts = [sums_of(rank=rank, world_size=world_size, size=size) for rank in range(world_size)]
    assert len({num_batches for _, num_batches in parts}) == 1
    labels_T = np.roll(teacher.sequences.token_ids_SL, -1, axis=1)[
        teacher.sequences.loss_mask_SL == 1
    ]
    whole_X = score_sums(
        head_logprobs(teacher.hidden_TG, teacher.head),
        head_logprobs(torch.ones(len(labels_T), 6), student),
        torch.from_numpy(labels_T.astype(np.int64)),
    )
    torch.testing.assert_close(sum((sums_X for sums_X, _ in parts), start=no_sums()), whole_X)
    assert scores_of(whole_X).num_tokens == teacher.sequences.num_targets


def test_a_sequence_without_targets_is_scored_on_nothing() -> None:
    teacher = teacher_of(torch.float32)
    silent = teacher.sequences.loss_mask_SL.copy()
    silent[2] = 0
    kept = teacher.sequences.loss_mask_SL[2].sum()
    counts = teacher.sequences.loss_mask_SL.sum(axis=1)
    before = int(counts[:2].sum())
    hidden_TG = torch.cat([teacher.hidden_TG[:before], teacher.hidden_TG[before + int(kept) :]])
    sequences = Sequences(teacher.sequences.token_ids_SL, teacher.sequences.positions_SL, silent)
    batches = replace(teacher, sequences=sequences, hidden_TG=hidden_TG).batches(
        rank=0, world_size=1, size=1, block_tokens=7
    )
    assert [batch.tokens.num_targets for batch in batches] == [
        len(batch.teacher_TG) for batch in batches
    ]
    assert batches[2].tokens.num_targets == 0
    torch.testing.assert_close(
        batches[3].teacher_TG, teacher.hidden_TG[before + int(kept) :][: counts[3]]
    )
