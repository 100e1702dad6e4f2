"""Rollouts as a data set: samples that ended themselves are learnt as they were sampled, a prompt
is on one side of the held-out split, and what is incomplete or of other ids is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from helpers.models import make_tokenizer
from helpers.rollouts import make_shard, small_rollout_recipe
from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError, StoreError
from stillhouse.models.tokenizers import vocabulary_digest
from stillhouse.sequence import Sequences
from stillhouse.sequences.accepted import accepted
from stillhouse.sequences.packing import Split, prepare_corpus
from stillhouse.sequences.source import CorpusSource, whole
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import CUT, ENDED

NUM_PROMPTS = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> RolloutStore:
    """Forty prompts, of each of which one sample of three ended itself."""
    recipe = small_rollout_recipe(
        vocabulary_digest=vocabulary_digest(tokenizer), num_prompts=NUM_PROMPTS, samples=3
    )
    store = RolloutStore.create(str(tmp_path_factory.mktemp("store")), recipe)
    for number in range(recipe.num_shards):
        shard = make_shard(recipe, number)
        shard.finish_S[shard.samples_S == 1] = ENDED  # and two of them
        shard.finish_S[shard.prompts_S == 3] = 2
        store.publish(shard)
    return store


def section_of(store: RolloutStore, **settings: Any) -> CorpusSection:
    values = {
        "dataset": f"rollouts://{store.recipe.fingerprint[:16]}",
        "sequence_length": 12,
        "heldout_sequences": 5,
        "packing": False,
    }
    return CorpusSection.model_validate(values | settings).in_store(store.url)


def split_of(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, cache: Path, **settings: Any
) -> Split:
    return prepare_corpus(
        section_of(store, **settings), tokenizer, tokenizer_digest="digest", cache_dir=cache
    )


def samples_in(store: RolloutStore) -> dict[bytes, tuple[int, Sequences]]:
    """By its ids: each sample that ended, and its prompt."""
    found = {}
    for number in range(store.recipe.num_shards):
        shard = store.fetch(number)
        for row in np.flatnonzero(shard.finish_S == ENDED):
            sequence = shard.sequences.select(slice(row, row + 1))
            found[sequence.token_ids_SL.tobytes()] = int(shard.prompts_S[row]), sequence
    return found


def test_samples_that_ended_are_learnt_with_the_masks_that_they_are_stored_with(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    split, wanted = split_of(store, tokenizer, tmp_path), samples_in(store)
    # one of the two samples of the prompt that the last held-out one answers is in neither
    assert (split.heldout.num_sequences, split.train.num_sequences) == (5, 2 * 39 - 6)
    prompts = []
    for corpus in (split.heldout, split.train):
        rows, here = whole(CorpusSource(corpus, 8)), set()
        for row in range(len(rows)):
            ids = rows.token_ids_SL[row].copy()
            ids[np.flatnonzero(rows.loss_mask_SL[row])[-1] + 2 :] = 0  # padding
            prompt, stored = wanted.pop(ids.tobytes())
            assert rows.loss_mask_SL[row].tolist() == stored.loss_mask_SL[0].tolist()
            assert rows.positions_SL[row].tolist() == stored.positions_SL[0].tolist()
            here.add(prompt)
        prompts.append(here)
    assert len(wanted) == 1
    assert not prompts[0] & prompts[1]


def test_what_is_left_out_is_told_by_its_reason(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for _ in ("made", "found"):
        assert split_of(store, tokenizer, tmp_path).account.lines() == [
            "78 documents: samples of 40 prompts that ended themselves",
            "left out: 39 samples that were cut before they ended",
            "left out: 3 samples of prompts that were set aside",
        ]


def test_rollouts_of_which_all_were_cut_are_refused_with_the_reason(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = small_rollout_recipe(vocabulary_digest=vocabulary_digest(tokenizer))
    store = RolloutStore.create(str(tmp_path / "store"), recipe)
    for number in range(recipe.num_shards):
        shard = make_shard(recipe, number)
        shard.finish_S[shard.finish_S == ENDED] = CUT
        store.publish(shard)
    with pytest.raises(CorpusError, match=r"every sample is left out: 8 samples that were cut"):
        split_of(store, tokenizer, tmp_path / "cache")


def test_rollouts_can_be_packed_as_any_documents_can(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    split = split_of(store, tokenizer, tmp_path, packing=True, sequence_length=64)
    padded = split_of(store, tokenizer, tmp_path)
    assert split.account.num_tokens == padded.account.num_tokens
    assert split.train.num_targets + split.heldout.num_targets < split.account.num_labels
    assert (whole(CorpusSource(split.train, 8)).positions_SL == 0).sum() > 10


def test_the_corpus_is_another_one_where_a_shard_was_written_again(
    tokenizer: PreTrainedTokenizerFast, store: RolloutStore, tmp_path: Path
) -> None:
    other = RolloutStore.create(str(tmp_path / "store"), store.recipe)
    for number in range(store.recipe.num_shards):
        other.publish(make_shard(store.recipe, number))
    before = split_of(other, tokenizer, tmp_path / "cache").train.digest
    (tmp_path / "store" / other.key(7)).unlink()
    with pytest.raises(StoreError, match="1 of 20 shards are not in"):
        split_of(other, tokenizer, tmp_path / "cache")
    other.publish(make_shard(store.recipe, 7, salt=1))
    assert split_of(other, tokenizer, tmp_path / "cache").train.digest != before


def test_rollouts_of_another_vocabulary_are_refused(store: RolloutStore, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "tokenizer", vocab_size=301)
    with pytest.raises(CorpusError, match="ids of another vocabulary"):
        split_of(store, other, tmp_path)


def test_a_setting_that_has_no_meaning_is_refused(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=r"corpus\.column mean nothing for rollouts"):
        split_of(store, tokenizer, tmp_path, column="text")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dataset": "rollouts://"}, "the 16 digits"),
        ({"dataset": "rollouts://0123456789ABCDEF"}, "the 16 digits"),
        ({"dataset": "rollouts:///store/0123456789abcdef", "format": "chat"}, "leave format out"),
        (
            {"dataset": "a.jsonl", "accept": {}},
            "accept is set, but dataset is a.jsonl; only samples",
        ),
        (
            {"dataset": "a.jsonl", "decontaminate": {}},
            "decontaminate is set, but dataset is a.jsonl",
        ),
    ],
)
def test_a_name_of_rollouts_that_is_none_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CorpusSection.model_validate(settings)


def test_rollouts_of_another_store_keep_their_place() -> None:
    own, other = "rollouts://0123456789abcdef", "rollouts://s3://bucket/a/0123456789abcdef"
    values = {"dataset": own, "mixed_with": [{"dataset": other}]}
    parts = CorpusSection.model_validate(values).in_store("/runs/store").parts()
    assert [each.dataset for each in parts] == ["rollouts:///runs/store/0123456789abcdef", other]
    assert {each.format for each in parts} == {"tokens"}


def test_a_view_that_does_not_ask_for_log_probabilities_keeps_its_identity(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The digest of `[corpus.accept]` without settings, by which stores are named already."""

    def identity(**accept: Any) -> str:
        section = section_of(store, accept=accept)
        return accepted(store, section, tokenizer, cache_dir=tmp_path).identity

    assert identity() == "125da736d5b4d0fc6cb36fbd624b0005f22f6bed02c6caf3a6dc5d7e70740922"
    assert identity(with_logprobs=True) != identity()
