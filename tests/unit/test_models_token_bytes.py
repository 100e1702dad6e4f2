"""Bytes of ids: what a text is made of, in tokenizers of both kinds; and ids of bytes, none of
which is a guess."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helpers.models import make_tokenizer
from helpers.spaced import SPACE, spaced_tokenizer
from stillhouse.errors import ModelError
from stillhouse.models.token_bytes import bytes_by_id, token_map

TEXTS = ["the end", "the \u00e9t\u00e9 \N{SNOWMAN}\n", "caf\u00e9\x00", "def f(x):\n    return x"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_ids_are_those_of_the_text(
    byte_level: PreTrainedTokenizerFast, text: str
) -> None:
    found = bytes_by_id(byte_level)
    assert b"".join(found[each] for each in byte_level.encode(text)) == text.encode()
    spaced = spaced_tokenizer()
    found = bytes_by_id(spaced)
    ids = spaced.encode(text, add_special_tokens=False)
    assert b"".join(found[each] for each in ids) == f" {text}".encode()


def test_every_id_of_a_byte_level_tokenizer_has_bytes_of_its_own(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    found = token_map(byte_level, end_ids=(0,))
    assert sorted(found.ids.values()) == [0, *range(3, 300)]  # 1 and 2 are special
    assert found.ids[b"<|endoftext|>"] == 0
    assert {bytes([byte]) for byte in range(256)} <= found.ids.keys()
    # a server that decodes tokens one by one never says a half character
    assert found.certain == found.ids
    assert found.proofs == {each for each in found.ids if each[-1] >= 0x80}


def test_a_token_added_to_the_vocabulary_is_its_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, vocab_size=300)
    tokenizer.add_tokens([AddedToken("a\u00e9 b", special=False)])
    assert bytes_by_id(tokenizer)[300] == "a\u00e9 b".encode()
    assert token_map(tokenizer, end_ids=()).ids["a\u00e9 b".encode()] == 300


def test_bytes_of_two_ids_are_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, vocab_size=300)
    words = [each for each in tokenizer.get_vocab() if each[0] == "\u0120" and each[1:].isascii()]
    word = max(words, key=len)
    said = f" {word[1:]}".encode()
    assert said in token_map(tokenizer, end_ids=()).ids
    tokenizer.add_tokens([AddedToken(said.decode(), special=False)])
    assert [*bytes_by_id(tokenizer).values()].count(said) == 2
    assert said not in token_map(tokenizer, end_ids=()).ids


def test_a_letter_is_its_token_and_not_its_byte() -> None:
    spaced = spaced_tokenizer()
    letter, byte, newline = (spaced.get_vocab()[each] for each in ("a", "<0x61>", "<0x0A>"))
    assert spaced.decode([letter]) == spaced.decode([byte]) == "a"
    found = token_map(spaced, end_ids=())
    assert (found.ids[b"a"], found.certain[b"a"], found.ids[b"\n"]) == (letter, letter, newline)


def test_what_a_server_may_mean_by_two_ids_is_none_until_it_proves_that_it_does_not() -> None:
    spaced = spaced_tokenizer()
    the, with_space = (spaced.get_vocab()[each] for each in ("the", f"{SPACE}the"))
    assert spaced.decode([with_space]) == "the"
    found = token_map(spaced, end_ids=(1,))
    assert b"the" not in found.of_server([b"the", b"th"])
    for proof in (b" the", b" end", b"\xc3"):
        ids = found.of_server([b"the", proof])
        assert (ids[b"the"], ids[b" the"]) == (the, with_space)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    with pytest.raises(ModelError, match=r"decodes by WordPiece; wanted a byte-level BPE.*leave"):
        token_map(tokenizer, end_ids=())
