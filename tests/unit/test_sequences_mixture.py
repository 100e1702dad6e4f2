"""Mixtures: each data set has its weight's share, no sequence is used twice, and the order is a
function of the config and the documents alone."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from helpers.models import CHAT_TEMPLATE, make_tokenizer
from stillhouse.config import CorpusSection, load_config
from stillhouse.errors import ConfigError, CorpusError
from stillhouse.sequences.mixture import shared_out
from stillhouse.sequences.source import SequenceSource, Sources, open_sources, whole

WORDS = ("aa", "bb", "cc")  # each of one data set


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHAT_TEMPLATE)


def write(folder: Path, sizes: Sequence[int]) -> list[str]:
    files = []
    for word, size in zip(WORDS, sizes, strict=False):
        file = folder / f"{word}.jsonl"
        rows = [{"text": f"{word} {number} " * 8} for number in range(size)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(file))
    return files


def opened(folder: Path, tokenizer: Any, files: Sequence[str], weights: Sequence[float]) -> Sources:
    tables = [
        {"dataset": file, "weight": weight} for file, weight in zip(files, weights, strict=True)
    ]
    section = CorpusSection.model_validate(
        {"sequence_length": 16, "heldout_sequences": 12, "mixed_with": tables[1:], **tables[0]}
    )
    return open_sources(
        section,
        tokenizer,
        tokenizer_digest="d",
        block_sequences=8,
        cache_dir=folder / "cache",
        on_progress=lambda *_: None,
    )


def data_sets_of(source: SequenceSource, tokenizer: Any) -> list[str]:
    """The data set of each sequence, by its words."""
    texts = [str(tokenizer.decode(ids)) for ids in whole(source).token_ids_SL]
    return [max(WORDS, key=text.count) for text in texts]


def test_each_data_set_has_its_share_and_the_smallest_for_its_weight_is_used_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    files = write(tmp_path, (60, 60, 60))
    alone = [opened(tmp_path, tokenizer, [file], [1.0]).train.num_sequences for file in files]
    mixture = opened(tmp_path, tokenizer, files, (3.0, 1.0, 0.0))
    counts = Counter(data_sets_of(mixture.train, tokenizer))
    assert set(counts) == {"aa", "bb"}
    assert counts["aa"] == pytest.approx(3 * counts["bb"], abs=2)
    assert alone[0] - 12 <= counts["aa"] <= alone[0] + 12  # all but what another count holds out
    assert Counter(data_sets_of(mixture.heldout, tokenizer)) == {"aa": 9, "bb": 3}

    # each once, and in an order that is a sample everywhere
    rows = [ids.tobytes() for ids in whole(mixture.train).token_ids_SL]
    assert len(set(rows)) == len(rows)
    assert set(data_sets_of(mixture.train, tokenizer)[:16]) == {"aa", "bb"}

    # what is told of it
    assert [(part.name, part.num_sequences) for part in mixture.parts] == [
        (file, counts[word]) for file, word in zip(files[:2], WORDS, strict=False)
    ]
    assert sum(part.num_targets for part in mixture.parts) == mixture.train.num_targets
    assert mixture.train.num_targets == whole(mixture.train).num_targets


def test_a_mixture_is_the_same_whoever_makes_it_and_another_by_weight_and_documents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    files = write(tmp_path, (20, 40))
    first = opened(tmp_path, tokenizer, files, (1, 2))
    again = opened(tmp_path / "elsewhere", tokenizer, files, (0.5, 1))
    assert first.train.identity == again.train.identity
    assert first.heldout.identity == again.heldout.identity
    for number in (0, first.train.num_blocks - 1):
        ours, theirs = first.train.block(number), again.train.block(number)
        assert np.array_equal(ours.token_ids_SL, theirs.token_ids_SL)
        assert np.array_equal(ours.loss_mask_SL, theirs.loss_mask_SL)
    others = [
        opened(tmp_path, tokenizer, files, (1, 1)),
        opened(tmp_path, tokenizer, files[::-1], (2, 1)),
        opened(tmp_path, tokenizer, files[:1], (1,)),
    ]
    digests = {each.train.identity.digest for each in [first, *others]}
    assert len(digests) == 4


def test_a_weight_of_less_than_a_sequence_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(CorpusError, match=r"weight 1e-05 is less than one sequence of \d+"):
        opened(tmp_path, tokenizer, write(tmp_path, (20, 20)), (1, 1e-5))


@pytest.mark.parametrize(
    ("total", "weights", "counts"),
    [
        (64, (1,), [64]),
        (12, (3, 1), [9, 3]),
        (3, (1e9, 1, 1e-9), [1, 1, 1]),
        (10, (1, 1, 1), [4, 3, 3]),
    ],
)
def test_things_are_shared_out_with_one_for_each(
    total: int, weights: Sequence[float], counts: list[int]
) -> None:
    assert shared_out(total, weights) == counts


TOML = """
[corpus]
dataset = './a.jsonl'
heldout_sequences = 1
weight = {}
[[corpus.mixed_with]]
dataset = './b.jsonl'
{} = {}
[teacher]
model = 'owner/big'
[student]
model = 'owner/small'
"""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, "weight", 0), "weights of all data sets are 0: there would be nothing to learn"),
        ((1, "weight", -1), "mixed_with.0.weight: .*greater than or equal to 0"),
        ((1, "dataset", "'./a.jsonl'"), r"a\.jsonl is named twice: .* with the sum of the weights"),
        ((1, "weight", 1), "heldout_sequences is 1, but a mixture of 2 data sets"),
        ((1, "datset", 1), r"corpus\.mixed_with\.0\.datset: no such setting; .*dataset"),
        ((1, "mask_column", "'m'"), "mask_column is set, but format is 'text'"),
    ],
)
def test_a_mixture_that_cannot_be_made_is_refused_by_its_setting(
    tmp_path: Path, values: tuple[object, ...], message: str
) -> None:
    text = TOML.format(*values)
    if values[1] == "dataset":
        text = text.replace("dataset = './b.jsonl'\n", "")
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "run.toml")


def test_the_paths_of_a_mixture_are_relative_to_their_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML.format(0, "weight", 2))
    corpus = load_config(tmp_path / "run.toml").corpus
    assert [each.dataset for each in corpus.parts()] == [str(tmp_path / "b.jsonl")]
    assert corpus.dataset == str(tmp_path / "a.jsonl")
