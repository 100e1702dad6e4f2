"""Tokenizers: what their digest covers, and which two are compatible."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.models import CHAT_TEMPLATE, make_tokenizer
from stillhouse.errors import ModelError
from stillhouse.models.tokenizers import (
    check_same_ids,
    load_tokenizer,
    tokenizer_digest,
    vocab_size_of,
)


def edited(
    directory: Path, *, swap: tuple[int, int] | None = None, drop: int | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of 320 ids with two ids exchanged, or without one."""
    make_tokenizer(directory)
    rules = json.loads((directory / "tokenizer.json").read_text())
    tokens = {number: token for token, number in rules["model"]["vocab"].items()}
    if swap is not None:
        tokens[swap[0]], tokens[swap[1]] = tokens[swap[1]], tokens[swap[0]]
    if drop is not None:
        gone = tokens.pop(drop)
        rules["model"]["merges"] = [
            pair for pair in rules["model"]["merges"] if gone not in (*pair, "".join(pair))
        ]
    rules["model"]["vocab"] = {token: number for number, token in tokens.items()}
    (directory / "tokenizer.json").write_text(json.dumps(rules))
    return load_tokenizer(str(directory))


def test_a_loaded_tokenizer_has_the_digest_of_the_one_that_was_saved(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, chat_template=CHAT_TEMPLATE)
    assert tokenizer_digest(load_tokenizer(str(tmp_path))) == tokenizer_digest(tokenizer)


def test_the_digest_does_not_change_with_use(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    before = tokenizer_digest(tokenizer)
    tokenizer(["some text", "more"], truncation=True, max_length=1)
    tokenizer.pad_token = tokenizer.eos_token
    with_padding = tokenizer_digest(tokenizer)
    tokenizer(["some text", "a"], padding=True)
    assert tokenizer_digest(tokenizer) == with_padding != before


def test_the_digest_changes_with_whatever_decides_ids(tmp_path: Path) -> None:
    plain = make_tokenizer(tmp_path / "plain")
    other_end = make_tokenizer(tmp_path / "end")
    other_end.eos_token = "<|im_end|>"
    others = [
        make_tokenizer(tmp_path / "chat", chat_template=CHAT_TEMPLATE),
        make_tokenizer(tmp_path / "larger", vocab_size=330),
        edited(tmp_path / "swapped", swap=(300, 301)),
        other_end,
    ]
    assert len({tokenizer_digest(tokenizer) for tokenizer in [plain, *others]}) == 5


def test_the_vocabulary_ends_at_the_highest_id_holes_and_all(tmp_path: Path) -> None:
    assert vocab_size_of(make_tokenizer(tmp_path / "whole")) == 320
    assert vocab_size_of(edited(tmp_path / "holed", drop=318)) == 320


def test_equal_id_maps_may_meet(tmp_path: Path) -> None:
    teacher = make_tokenizer(tmp_path / "teacher")
    check_same_ids(teacher, make_tokenizer(tmp_path / "student", chat_template=CHAT_TEMPLATE))
    check_same_ids(teacher, edited(tmp_path / "holed", drop=318))


def test_ids_that_mean_two_things_are_counted_and_shown(tmp_path: Path) -> None:
    teacher = make_tokenizer(tmp_path / "teacher")
    with pytest.raises(ModelError, match=r"disagree about 2 ids: 300 is .*301 is .*same tokenizer"):
        check_same_ids(teacher, edited(tmp_path / "student", swap=(300, 301)))


def test_a_longer_id_map_is_refused_from_either_side(tmp_path: Path) -> None:
    short, long = (
        make_tokenizer(tmp_path / "short"),
        make_tokenizer(tmp_path / "long", vocab_size=330),
    )
    with pytest.raises(
        ModelError,
        match=r"teacher's tokenizer ends at id 319, the student's at 329: 10 ids.*the student's "
        r"\(.*329 is",
    ):
        check_same_ids(short, long)
    with pytest.raises(
        ModelError, match=r"ends at id 329, the student's at 319: 10 ids.*the teacher's"
    ):
        check_same_ids(long, short)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/absent", "no directory /absent"),
        ("owner/absent", "tokenizer of owner/absent cannot be loaded.*the hub was not reached"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_named_with_what_to_do(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load_tokenizer(model)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"tokenizer"):
        load_tokenizer(str(tmp_path))
