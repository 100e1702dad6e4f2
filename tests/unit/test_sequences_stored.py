"""Stored sequences: a teacher that is sent where tokens are reads what was packed, bit for bit, and
refuses anything else."""

import json
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from helpers.damage import flip_bit
from helpers.models import make_tokenizer
from helpers.rollouts import make_shard, small_rollout_recipe
from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.models.tokenizers import vocabulary_digest
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.sequences.pieces import StoredSequences
from stillhouse.sequences.source import SequenceSource, item_of, open_sources
from stillhouse.sequences.stored import StoredItem, StoredReader
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollout_tokens import Piece, PieceTokens, RolloutTokens
from stillhouse.store.rollouts import ENDED

BLOCK = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


MakeStore = Callable[..., RolloutStore]


@pytest.fixture
def make_store(tokenizer: PreTrainedTokenizerFast) -> MakeStore:
    """Sixty prompts in shards of four, of each of which all of three samples ended themselves."""

    def make(url: str, **changes: Any) -> RolloutStore:
        values = {"num_prompts": 60, "shard_prompts": 4, "samples": 3} | changes
        digest = vocabulary_digest(tokenizer)
        recipe = small_rollout_recipe(vocabulary_digest=digest, **values)
        store = RolloutStore.create(url, recipe)
        for number in range(recipe.num_shards):
            publish(store, number)
        return store

    return make


def publish(store: RolloutStore, number: int, *, salt: int = 0) -> None:
    shard = make_shard(store.recipe, number, salt=salt)
    shard.finish_S[shard.prompts_S != 3] = ENDED
    store.publish(shard)


def opened(
    section: CorpusSection, tokenizer: PreTrainedTokenizerFast, cache: Path
) -> SequenceSource:
    return open_sources(
        section,
        tokenizer,
        tokenizer_digest="digest",
        block_sequences=BLOCK,
        cache_dir=cache,
        on_progress=lambda *_: None,
    ).train


def source_of(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, cache: Path, **settings: Any
) -> SequenceSource:
    values = {
        "dataset": f"rollouts://{store.recipe.fingerprint[:16]}",
        "sequence_length": 12,
        "heldout_sequences": 3,
        "packing": False,
    }
    section = CorpusSection.model_validate(values | settings).in_store(store.url)
    return opened(section, tokenizer, cache)


def write_texts(file: Path) -> str:
    rows = [{"text": f"the {number} quick brown foxes jump"} for number in range(200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sent(item: object) -> Any:
    """The item as another process has it."""
    return pickle.loads(pickle.dumps(item))


def assert_same(found: Sequences, wanted: Sequences) -> None:
    for here, there in zip(found.arrays, wanted.arrays, strict=True):
        np.testing.assert_array_equal(here, there, strict=True)


@pytest.fixture(params=["directory", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "directory":
        return str(tmp_path / "store")
    bucket = f"stored-{uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=request.getfixturevalue("s3_endpoint")).create_bucket(
        Bucket=bucket
    )
    return f"s3://{bucket}/store"


def read_all(source: SequenceSource) -> list[Sequences]:
    """Every block, as a teacher reads it that is sent where its tokens are."""
    reader, found = StoredReader(), []
    for number in range(source.num_blocks):
        item = sent(item_of(source, number))
        assert isinstance(item, StoredItem)
        found.append(reader.work(item).sequences)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sequence_length": 7},  # some samples are cut
        {"sequence_length": 20},
        {"packing": True},
        {"packing": True, "sequence_length": 5},  # a sample goes on in the next sequence
        {"packing": True, "sequence_length": 64},
    ],
    ids=str,
)
def test_a_teacher_reads_from_the_store_what_was_packed(
    settings: dict[str, Any],
    url: str,
    make_store: MakeStore,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    source = source_of(make_store(url), tokenizer, tmp_path / "cache", **settings)
    assert source.num_blocks > 1
    for number, found in enumerate(read_all(source)):
        assert_same(found, source.block(number))


def test_so_it_does_in_a_mixture_whose_other_part_is_sent_as_ids(
    make_store: MakeStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    store = make_store(str(tmp_path / "store"))
    mixed_with = [{"dataset": write_texts(tmp_path / "texts.jsonl"), "weight": 0.5}]
    source = source_of(store, tokenizer, tmp_path / "cache", packing=True, mixed_with=mixed_with)
    parts = [
        part
        for number in range(source.num_blocks)
        if isinstance(item := item_of(source, number), StoredItem)
        for part in item.block.parts
    ]
    kinds = Counter(map(type, parts))
    assert kinds[StoredSequences] > kinds[Sequences] > 0
    for number, found in enumerate(read_all(source)):
        assert_same(found, source.block(number))


def test_texts_are_sent_as_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    dataset = write_texts(tmp_path / "texts.jsonl")
    section = CorpusSection(dataset=dataset, sequence_length=12, heldout_sequences=3)
    item = item_of(opened(section, tokenizer, tmp_path / "cache"), 1)
    assert isinstance(item, WorkItem)
    assert StoredReader().work(item) is item


def test_what_is_sent_has_no_tokens_and_is_a_tenth_of_them(
    make_store: MakeStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    store = make_store(str(tmp_path / "store"), sequence_length=512, max_new_tokens=500)
    source = source_of(store, tokenizer, tmp_path / "cache", packing=True, sequence_length=1024)
    by_place, by_ids = pickle.dumps(item_of(source, 0)), pickle.dumps(source.block(0))
    assert source.block(0).token_ids_SL[0, :64].tobytes() not in by_place
    assert len(by_place) < len(by_ids) / 10


@pytest.mark.parametrize("packing", [False, True])
def test_sequences_are_tried_alone_and_set_aside_as_those_that_are_sent(
    packing: bool, make_store: MakeStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    store = make_store(str(tmp_path / "store"))
    source = source_of(store, tokenizer, tmp_path / "cache", packing=packing)
    item, ids, reader = item_of(source, 1), WorkItem(1, source.block(1)), StoredReader()
    without = frozenset({2, 5})
    assert_same(reader.work(item.only(3)).sequences, ids.only(3).sequences)
    assert_same(reader.work(item.without(without)).sequences, ids.without(without).sequences)
    both = reader.work(item.without(without).only(2))
    assert_same(both.sequences, ids.without(without).only(2).sequences)


# ---- what is refused


@pytest.fixture
def store(make_store: MakeStore, tmp_path: Path) -> RolloutStore:
    return make_store(str(tmp_path / "store"))


@pytest.fixture
def source(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> SequenceSource:
    return source_of(store, tokenizer, tmp_path / "cache")


def path_of(store: RolloutStore, number: int) -> Path:
    return Path(store.url) / store.key(number)


def refusal_of(source: SequenceSource) -> str:
    with pytest.raises(CorpusError) as refusal:
        read_all(source)
    return str(refusal.value)


def test_a_shard_that_is_damaged_is_named_wherever_the_damage_is_in_what_is_read(
    source: SequenceSource, store: RolloutStore
) -> None:
    shard = store.fetch(7)
    for tensor in ("token_ids", "loss_mask"):
        data = path_of(store, 7).read_bytes()
        # of a token of the first sample: a low bit, so that it stays an id and a mask
        place = -(-data.index(shard.tensors[tensor].tobytes()) // 8) * 8
        flip_bit(path_of(store, 7), place)
        assert "packed from: shard 7 is damaged: it hashes to" in refusal_of(source)
        path_of(store, 7).write_bytes(data)
    read_all(source)


def test_a_shard_that_is_cut_short_is_named(source: SequenceSource, store: RolloutStore) -> None:
    path, data = path_of(store, 7), path_of(store, 7).read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) * 3 // 4):
        path.write_bytes(data[:size])
        assert "packed from: shard 7 " in refusal_of(source)


def test_a_shard_that_is_gone_is_named_with_what_to_do(
    source: SequenceSource, store: RolloutStore
) -> None:
    path_of(store, 7).unlink()
    words = refusal_of(source)
    assert "shard 7 is not in" in words
    assert "`stillhouse generate`, given again, writes what is missing" in words


def test_a_shard_that_was_written_anew_with_other_tokens_is_refused(
    source: SequenceSource, store: RolloutStore
) -> None:
    path_of(store, 7).unlink()
    publish(store, 7, salt=1)
    assert "written anew, with other tokens" in refusal_of(source)


def test_what_was_damaged_on_the_way_alone_is_read_again(
    source: SequenceSource, store: RolloutStore
) -> None:
    damaging = DamagedRanges(store)
    work = StoredReader(lambda _: damaging).work(item_of(source, 0))
    assert damaging.num_damaged
    assert_same(work.sequences, source.block(0))


class DamagedRanges(RolloutTokens):
    """A proxy that flips a bit of everything that is read by ranges."""

    num_damaged = 0

    def read(self, number: int, pieces: Sequence[Piece]) -> list[PieceTokens]:
        self.num_damaged += 1
        return [PieceTokens(ids ^ 1, mask) for ids, mask in super().read(number, pieces)]
