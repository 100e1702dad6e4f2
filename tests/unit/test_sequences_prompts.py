"""Prompts: rows are rendered up to where an assistant's turn begins, once, and rows that are no
prompts are refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.models import CHAT_TEMPLATE, make_tokenizer
from stillhouse.config.generate import PromptsSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.prompts import Prompts, prepare_prompts

QUESTIONS = [f"What is {n} + {n}?" for n in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHAT_TEMPLATE)


def prompts_of(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
    *,
    most_tokens: int = 100,
    with_sources: bool = False,
    **settings: Any,
) -> Prompts:
    file = folder / "prompts.jsonl"
    if not file.exists():  # else the cache would be of another file
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_prompts(
        PromptsSection.model_validate({"dataset": str(file)} | settings),
        tokenizer,
        tokenizer_digest="digest",
        most_tokens=most_tokens,
        with_sources=with_sources,
        cache_dir=folder / "cache",
    )


def texts(prompts: Prompts, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode(prompts[number])) for number in range(len(prompts))]


def asked(question: str, *more: dict[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, *more]}


def test_a_source_is_what_a_server_is_asked_and_part_of_the_digest(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    chats = [asked("One?"), asked("Two?") | {"tools": [{"type": "function", "function": {}}]}]
    found = prompts_of(tmp_path, tokenizer, chats, with_sources=True)
    assert sorted(found.sources) == sorted(json.dumps(chat) for chat in chats)
    again = prompts_of(tmp_path, tokenizer, chats, with_sources=True)
    without = prompts_of(tmp_path, tokenizer, chats)
    assert (again.sources, without.sources) == (found.sources, ())
    assert again.digest == found.digest != without.digest
    (tmp_path / "texts").mkdir()
    rows = [{"text": "One"}]
    texts = prompts_of(tmp_path / "texts", tokenizer, rows, with_sources=True, format="text")
    assert texts.sources == ('{"text": "One"}',)


def test_a_chat_ends_where_the_assistants_turn_begins(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = prompts_of(tmp_path, tokenizer, [asked(question) for question in QUESTIONS])
    assert sorted(texts(found, tokenizer)) == sorted(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS
    )
    assert found.references == ()


def test_a_text_is_gone_on_with_and_has_the_reference_of_its_own_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"question": question, "answer": f"to {question}"} for question in QUESTIONS]
    settings: dict[str, Any] = {
        "format": "text",
        "prompt_column": "question",
        "reference_column": "answer",
        "max_prompts": 15,
    }
    found = prompts_of(tmp_path, tokenizer, rows, **settings)
    again = prompts_of(tmp_path, tokenizer, rows, **settings)
    assert set(texts(found, tokenizer)) < set(QUESTIONS)
    assert len(found) == 15
    for one in (found, again):
        assert one.references == tuple(f"to {text}" for text in texts(found, tokenizer))
        assert one.digest == found.digest
        assert one.account == found.account
    (file,) = tmp_path.glob("cache/prompts/*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert prompts_of(tmp_path, tokenizer, rows, **settings).digest == found.digest
    assert file.read_bytes() != bytes(data)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (asked("2 + 2?", {"role": "assistant", "content": "4"}), "last turn is an assistant's"),
        (asked("long " * 200), r"tokens; wanted: 1 to 100, which is sampling\.sequence_length"),
        ({"messages": []}, "row 20 of"),
    ],
)
def test_a_row_that_is_no_prompt_is_refused_or_skipped_up_to_a_share(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, bad: dict[str, Any], words: str
) -> None:
    rows = [*(asked(question) for question in QUESTIONS), bad]
    with pytest.raises(CorpusError, match=f"(?s){words}.*prompts.max_bad_rows"):
        prompts_of(tmp_path, tokenizer, rows)
    found = prompts_of(tmp_path, tokenizer, rows, max_bad_rows=0.1)
    assert len(found) == 20
    assert [each.row for each in found.account.bad_rows] == [20]


def test_a_missing_column_is_told_by_the_name_of_its_setting(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(CorpusError, match=r"no column 'text'; .*prompts\.prompt_column"):
        prompts_of(tmp_path, tokenizer, [{"question": "a"}], format="text")
