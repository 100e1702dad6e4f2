"""What every source of sequences has to keep: the same blocks whoever asks, of one shape, with
targets that exist."""

from pathlib import Path

import numpy as np
import pytest

from helpers.world import write_documents
from stillhouse.config import CorpusSection
from stillhouse.models.tokenizers import load_tokenizer, tokenizer_digest, vocab_size_of
from stillhouse.sequences.source import Sources, open_sources

BLOCK, LENGTH = 8, 32


@pytest.fixture
def section(source_name: str, tmp_path: Path) -> CorpusSection:
    write_documents(tmp_path / "documents.jsonl")
    return CorpusSection(
        source=source_name,
        dataset=str(tmp_path / "documents.jsonl"),
        sequence_length=LENGTH,
        heldout_sequences=8,
    )


def opened(
    section: CorpusSection, teacher_dir: Path, cache_dir: Path, *, block: int = BLOCK
) -> Sources:
    tokenizer = load_tokenizer(str(teacher_dir))
    return open_sources(
        section,
        tokenizer,
        tokenizer_digest=tokenizer_digest(tokenizer),
        block_sequences=block,
        cache_dir=cache_dir,
        on_progress=lambda *_: None,
    )


def test_every_block_has_its_sequences_their_types_and_ids_of_the_vocabulary(
    section: CorpusSection, teacher_dir: Path, tmp_path: Path
) -> None:
    vocab_size = vocab_size_of(load_tokenizer(str(teacher_dir)))
    for source in (sources := opened(section, teacher_dir, tmp_path)).train, sources.heldout:
        blocks = [source.block(number) for number in range(source.num_blocks)]
        assert [len(block) for block in blocks[:-1]] == [BLOCK] * (source.num_blocks - 1)
        assert sum(len(block) for block in blocks) == source.num_sequences
        assert sum(block.num_targets for block in blocks) == source.num_targets
        for block in blocks:
            assert [array.dtype for array in block.arrays] == [np.int32, np.int32, np.uint8]
            assert {array.shape for array in block.arrays} == {(len(block), source.sequence_length)}
            assert 0 <= block.token_ids_SL.min() <= block.token_ids_SL.max() < vocab_size


def test_positions_count_up_within_documents_and_no_target_crosses_their_ends(
    section: CorpusSection, teacher_dir: Path, tmp_path: Path
) -> None:
    source = opened(section, teacher_dir, tmp_path).train
    for number in range(source.num_blocks):
        block = source.block(number)
        starts_SL = block.positions_SL == 0
        assert starts_SL[:, 0].all()
        assert (np.diff(block.positions_SL, axis=1)[~starts_SL[:, 1:]] == 1).all()
        assert not block.loss_mask_SL[:, -1].any()
        assert not (block.loss_mask_SL[:, :-1] & starts_SL[:, 1:]).any()
        assert set(np.unique(block.loss_mask_SL)) <= {0, 1}


def test_whoever_opens_it_and_whatever_was_read_before_a_block_is_the_same(
    section: CorpusSection, teacher_dir: Path, tmp_path: Path
) -> None:
    first, again = (
        opened(section, teacher_dir, tmp_path).train,
        opened(section, teacher_dir, tmp_path / "another cache").train,
    )
    assert first.identity == again.identity
    for number in reversed(range(first.num_blocks)):
        ours, theirs = first.block(number), again.block(number)
        assert np.array_equal(ours.token_ids_SL, theirs.token_ids_SL)
        assert np.array_equal(ours.positions_SL, theirs.positions_SL)
        assert np.array_equal(ours.loss_mask_SL, theirs.loss_mask_SL)


def test_training_and_held_out_sequences_are_two_plans(
    section: CorpusSection, teacher_dir: Path, tmp_path: Path
) -> None:
    sources = opened(section, teacher_dir, tmp_path)
    assert sources.train.identity != sources.heldout.identity
