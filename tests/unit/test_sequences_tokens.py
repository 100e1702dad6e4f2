"""Tokenising: bounded memory and time, and rows in the forms in use."""

import json
import signal
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from helpers.models import CHAT_TEMPLATE, EOS, make_tokenizer
from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.conversations import Conversation, form_of
from stillhouse.sequences.documents import Documents, load_documents
from stillhouse.sequences.packing import Split, prepare_corpus
from stillhouse.sequences.tokens import tokenise

QUESTION = {"role": "user", "content": "Which tree is it?"}
ANSWER = {"role": "assistant", "content": "An old oak."}
ENDLESS_TEMPLATE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@dataclass
class CountingTokenizer:
    """Writes every text as the same ids, and keeps what it was given at one time."""

    ids: Any
    calls: list[Sequence[str]] = field(default_factory=list)
    eos_token_id = pad_token_id = 0
    name_or_path = "counting"
    chat_template = "it has one"
    added_tokens_decoder: dict[int, Any] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str], **_settings: Any) -> dict[str, list[Any]]:
        self.calls.append(list(texts))
        # all of them in the answer
        offsets_N2 = np.full((len(self.ids), 2), len(QUESTION["content"]))
        return {"input_ids": [self.ids] * len(texts), "offset_mapping": [offsets_N2] * len(texts)}

    def apply_chat_template(self, turns: list[dict[str, str]], **_settings: Any) -> str:
        return "".join(turn["content"] for turn in turns)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(
        tmp_path_factory.mktemp("tokenizer"), vocab_size=400, chat_template=CHAT_TEMPLATE
    )


def prepare(folder: Path, rows: Sequence[dict[str, Any]], tokenizer: Any, **settings: Any) -> Split:
    file = folder / "corpus.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    section = CorpusSection.model_validate(
        {"dataset": str(file), "sequence_length": 16, "heldout_sequences": 1, **settings}
    )
    return prepare_corpus(section, tokenizer, tokenizer_digest="digest", cache_dir=folder / "cache")


# ---- memory


@pytest.mark.parametrize(
    ("as_row", "settings"),
    [
        (lambda text: {"text": text}, {}),
        (
            lambda text: {"messages": [QUESTION, {"role": "assistant", "content": text}]},
            {"format": "chat"},
        ),
    ],
    ids=["text", "chat"],
)
def test_documents_are_tokenised_some_megabytes_of_them_at_a_time(
    tmp_path: Path, as_row: Callable[[str], dict[str, Any]], settings: dict[str, Any]
) -> None:
    """A tokenizer needs some 200 bytes for each of a text. A document that is longer alone than the
    limit is tokenised alone."""
    long, longer, limit = "木" * 500_000, "木" * 2_000_000, 4 << 20
    texts = [long, "short"] * 10 + [longer] + ["short"] * 1000
    tokenizer = CountingTokenizer(ids=[1] * 20)
    prepare(tmp_path, [as_row(text) for text in texts], tokenizer, **settings)
    sizes = [sum(len(text.encode()) for text in call) for call in tokenizer.calls]
    assert sum(map(len, tokenizer.calls)) == len(texts)
    assert [
        len(call) for call, size in zip(tokenizer.calls, sizes, strict=True) if size > limit
    ] == [1]
    assert max(map(len, tokenizer.calls)) == 256


def test_a_conversation_that_is_cut_does_not_stay_in_memory_whole(tmp_path: Path) -> None:
    num_rows, num_tokens = 64, 500_000
    tokenizer = CountingTokenizer(ids=np.ones(num_tokens, dtype=np.int32))
    tracemalloc.start()
    prepare(
        tmp_path,
        [{"messages": [QUESTION, ANSWER]}] * num_rows,
        tokenizer,
        format="chat",
        packing=False,
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < num_rows * num_tokens


# ---- templates


def conversations(*rows: Any) -> Documents:
    return Documents(
        "values",
        np.arange(len(rows)),
        lambda row: Conversation(rows[row]),
        lambda row: ("somewhere", row),
    )


def test_a_template_that_does_not_end_is_stopped_and_named(tmp_path: Path) -> None:
    endless = make_tokenizer(tmp_path, chat_template=ENDLESS_TEMPLATE)
    section = CorpusSection(dataset="somewhere", format="chat")
    found = tokenise(conversations([QUESTION, ANSWER]), section, endless, template_limit_s=0.2)
    with pytest.raises(
        CorpusError,
        match=r"row 0 of somewhere: the chat template of .* took more than 0\.2 s .*first 2 turns",
    ):
        next(found)


def test_a_limit_that_was_not_reached_leaves_no_trace(tokenizer: PreTrainedTokenizerFast) -> None:
    section = CorpusSection(dataset="somewhere", format="chat")
    before = signal.getsignal(signal.SIGVTALRM)
    assert len(list(tokenise(conversations(*[[QUESTION, ANSWER]] * 3), section, tokenizer))) == 3
    assert (signal.getitimer(signal.ITIMER_VIRTUAL), signal.getsignal(signal.SIGVTALRM)) == (
        (0.0, 0.0),
        before,
    )


def test_conversations_are_rendered_in_other_threads_than_the_main_one_too(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    section = CorpusSection(dataset="somewhere", format="chat")
    with ThreadPoolExecutor() as threads:
        assert (
            len(
                threads.submit(
                    lambda: list(tokenise(conversations([QUESTION, ANSWER]), section, tokenizer))
                ).result()
            )
            == 1
        )


@pytest.mark.parametrize("packing", [True, False])
def test_a_conversation_of_which_a_template_writes_nothing_is_left_out(
    tmp_path: Path, packing: bool
) -> None:
    """As every sequence is that holds no target."""
    silent = make_tokenizer(
        tmp_path / "tokenizer",
        chat_template="{% if messages[0]['content'] != 'hush' %}" + CHAT_TEMPLATE + "{% endif %}",
    )
    said, unsaid = [QUESTION, ANSWER], [{"role": "user", "content": "hush"}, ANSWER]
    rows = [{"messages": turns} for turns in [said, unsaid] * 6]
    split = prepare(
        tmp_path,
        rows,
        silent,
        format="chat",
        packing=packing,
        sequence_length=64,
        heldout_sequences=2,
    )
    (tmp_path / "without").mkdir()
    others = prepare(
        tmp_path / "without",
        rows[::2],
        silent,
        format="chat",
        packing=packing,
        sequence_length=64,
        heldout_sequences=2,
    )
    assert split.train.num_targets == others.train.num_targets
    assert split.train.num_sequences == others.train.num_sequences


# ---- rows of other forms


IN_CHATML = "<|im_start|>{}\n{}<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Ho"},
                ]
            },
            [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")],
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
            },
            [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "o"}],
                    },
                ]
            },
            [("user", "Hi"), ("assistant", "Ho")],
        ),
        ({"prompt": "Hi", "completion": "Ho"}, [("user", "Hi"), ("assistant", "Ho")]),
        ({"prompt": "Hi", "response": "Ho"}, [("user", "Hi"), ("assistant", "Ho")]),
        ({"question": "Hi", "answer": "Ho"}, [("user", "Hi"), ("assistant", "Ho")]),
        (
            {"instruction": "Answer.", "input": "Hi", "output": "Ho"},
            [("user", "Answer.\nHi"), ("assistant", "Ho")],
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Ho"},
            [("user", "Hi"), ("assistant", "Ho")],
        ),
    ],
)
def test_every_form_of_a_conversation_is_read_by_the_names_of_its_columns(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    row: dict[str, Any],
    expected: list[tuple[str, str]],
) -> None:
    split = prepare(
        tmp_path, [row] * 3, tokenizer, format="chat", packing=False, sequence_length=128
    )
    rows = split.train.rows(0, 1)
    text = str(tokenizer.decode(rows.token_ids_SL[0])).replace(EOS, "")
    assert text == "".join(IN_CHATML.format(*turn) for turn in expected)
    learnt = tokenizer.decode(rows.token_ids_SL[0, 1:][rows.loss_mask_SL[0, :-1] == 1])
    assert learnt == "Ho<|im_end|>"


GROW: dict[str, Any] = {"name": "grow", "arguments": {"tree": "oak", "by": None}}
FELL: dict[str, Any] = {"name": "fell", "arguments": {"at": {"deep": True}}}


@pytest.mark.parametrize(
    "written",
    [
        lambda call: {"id": "1", "type": "function", "function": call},
        lambda call: {"function": {**call, "arguments": json.dumps(call["arguments"])}},
        lambda call: call,
    ],
    ids=["objects", "texts", "flat"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_calls_of_tools_are_read_as_they_were_written_in_rows_of_other_fields(
    tmp_path: Path, written: Callable[[dict[str, Any]], dict[str, Any]], suffix: str
) -> None:
    """A table gives every object the fields of all others."""
    turns = [
        [QUESTION, {"role": "assistant", "content": None, "tool_calls": [written(call)]}]
        for call in (GROW, FELL)
    ]
    tools = [[{"type": "function", "function": {"name": name}}] for name in ("grow", "fell")]
    rows = [{"messages": turn, "tools": tool} for turn, tool in zip(turns, tools, strict=True)]
    file = tmp_path / f"calls{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = load_documents(
        CorpusSection(dataset=str(file), format="chat"), cache_dir=tmp_path / "cache"
    )
    for number, call in enumerate((GROW, FELL)):
        found = documents.read(number)
        function = found.messages[1]["tool_calls"][0]["function"]
        assert function["name"] == call["name"]
        assert {k: v for k, v in function["arguments"].items() if v is not None} == {
            k: v for k, v in call["arguments"].items() if v is not None
        }
        assert found.messages[1]["content"] == ""
        assert found.tools == tools[number]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"content": None}, r"as turn 1: \{'role': 'assistant', 'content': None\}; give it a text"),
        ({"content": 7}, "'content' is a int"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "type 'image_url'; only text"),
        ({"content": None, "tool_calls": [{"function": {}}]}, "no name of a function"),
        (
            {"content": None, "tool_calls": [{"name": "grow", "arguments": "{bad"}]},
            "arguments of its call of grow are not JSON",
        ),
        (
            {"content": None, "tool_calls": [{"name": "grow", "arguments": "[1]"}]},
            "arguments of its call of grow are not an object",
        ),
        ({"content": None, "function_call": {"name": "grow"}}, "write it as 'tool_calls'"),
    ],
)
def test_a_message_that_is_none_says_why(turn: dict[str, Any], message: str) -> None:
    form = form_of(["messages"], None)
    assert form is not None
    with pytest.raises(CorpusError, match=message):
        form.document({"messages": [QUESTION, {"role": "assistant", **turn}]})


def test_the_turn_at_fault_is_shown_however_long_those_before_it_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "grow", "arguments": "oak"}}],
    }
    rows = [
        {
            "messages": [
                {"role": "user", "content": "word " * 200},
                call,
                {"role": "tool", "content": "4"},
                ANSWER,
            ]
        }
    ]
    with pytest.raises(
        CorpusError,
        match=r"as turn 1: .*'content': None, 'tool_calls'.*grow.*; the arguments of its call of "
        r"grow are not JSON",
    ):
        prepare(tmp_path, rows, tokenizer, format="chat")


def test_a_turn_without_a_text_is_asked_for_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"messages": [QUESTION, {"role": "assistant", "content": None}]}]
    with pytest.raises(
        CorpusError,
        match=r"as turn 1: \{'role': 'assistant', 'content': None\}; give it a text, or leave",
    ):
        prepare(tmp_path, rows, tokenizer, format="chat")
