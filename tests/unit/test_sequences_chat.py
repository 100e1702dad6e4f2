"""Chat templates: what is learnt is what an assistant wrote, by rules that look at the rendered
text alone; and what a template drops or rewrites is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from helpers.chattemplates import (
    CHATML,
    GEMMA,
    LLAMA3,
    MARKED_CHATML,
    MISTRAL,
    QWEN3,
)
from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.account import Account
from stillhouse.sequences.chat import ChatTemplate, Rendered, Way
from stillhouse.sequences.conversations import Conversation
from stillhouse.sequences.documents import Documents
from stillhouse.sequences.tokens import tokenise

TEMPLATES = {
    "ChatML": CHATML,
    "ChatML with marks": MARKED_CHATML,
    "Llama 3": LLAMA3,
    "Qwen3": QWEN3,
    "Mistral": MISTRAL,
    "Gemma": GEMMA,
}
TOOL = {"type": "function", "function": {"name": "grow", "parameters": {"type": "object"}}}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, *calls: str) -> dict[str, Any]:
    made = [
        {"type": "function", "function": {"name": name, "arguments": {"tree": "Eiche — 木"}}}
        for name in calls
    ]
    return {"role": "assistant", "content": text} | ({"tool_calls": made} if made else {})


TALK = [
    Conversation([user("Which tree?"), answer("An old oak.")]),
    Conversation([system("Be brief."), user("Which?"), answer(" Ash… 木 \n"), user("Sure?")]),
    Conversation([user("a"), answer("b"), user("c"), answer("d"), user("e"), answer("f " * 9)]),
]
CALLS = [
    Conversation([user("Grow."), answer("", "grow")], [TOOL]),
    Conversation(
        [user("Grow."), answer("", "grow"), {"role": "tool", "content": "ok"}, answer("Grown.")],
        [TOOL],
    ),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: one.tokenizer(folder / name) for name, one in TEMPLATES.items()}


def render(tokenizer: Any, conversation: Conversation, **settings: Any) -> Rendered:
    return ChatTemplate(tokenizer, **settings).rendered(conversation)


def masks(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Conversation], account: Account
) -> list[list[bool]]:
    documents = Documents(
        "values", np.arange(len(rows)), lambda row: rows[row], lambda row: ("somewhere", row)
    )
    section = CorpusSection(dataset="somewhere", format="chat")
    return [
        one.is_label.tolist() for one in tokenise(documents, section, tokenizer, account=account)
    ]


def owned(tokenizer: PreTrainedTokenizerFast, text: str, spans: Any) -> list[bool]:
    """Of each token, whether its first character is in a span, one character after the other."""
    characters = [any(start <= at < stop for start, stop in spans) for at in range(len(text))]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [characters[first] for first, _ in found["offset_mapping"]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learnt_is_what_an_assistant_wrote(
    name: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    tokenizer, template = tokenizers[name], TEMPLATES[name]
    rows = TALK if name == "Gemma" else TALK + CALLS
    account = Account()
    found = masks(tokenizer, rows, account)
    ways = [render(tokenizer, row).way for row in rows]
    for row, mask, way in zip(rows, found, ways, strict=True):
        messages = list(row.messages)
        if way is Way.LAST:  # it ends with the last answer
            last = max(n for n, each in enumerate(messages) if each["role"] == "assistant")
            messages = messages[: last + 1]
        tools: list[Any] = list(row.tools)
        text = str(tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False))
        spans = template.spans(text)
        assert len(spans) == sum(each["role"] == "assistant" for each in messages)
        assert mask == owned(tokenizer, text, spans[-1:] if way is Way.LAST else spans)
        assert True in mask
    assert account.ways == {way: ways.count(way) for way in set(ways)}


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("ChatML", {Way.PREFIXES}),
        ("ChatML with marks", {Way.MARKS}),
        ("Llama 3", {Way.PREFIXES}),
        ("Gemma", {Way.PREFIXES}),
        ("Qwen3", {Way.PREFIXES, Way.LAST}),
    ],
)
def test_a_template_that_rewrites_earlier_messages_teaches_the_last_one_alone(
    name: str, ways: set[Way], tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    thoughts = [answer(f"<think>\nhm\n</think>\n\n{word}") for word in ("One", "Two")]
    row = Conversation([user("a"), thoughts[0], user("b"), thoughts[1], user("c")])
    found = render(tokenizers[name], row)
    assert {render(tokenizers[name], each).way for each in [*TALK[::2], row]} == ways
    learnt = [found.text[start:stop] for start, stop in found.spans]
    if Way.LAST in ways:
        assert learnt == ["<think>\nhm\n</think>\n\nTwo<|im_end|>"]
        assert "hm" not in found.text[: found.spans[0][0]]
        assert found.text.endswith("<|im_end|>\n")
    else:
        assert [each.count("hm") for each in learnt] == [1, 1]


@pytest.mark.parametrize("by_default", ["true", "false"])
def test_a_generation_prompt_that_begins_the_reasoning_is_as_the_answer_asks(
    by_default: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    source = (
        "{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.role == 'assistant' %}"
        "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]"
        f"{{% if enable_thinking | default({by_default}) %}}<think>{{% else %}}<think></think>"
        "{% endif %}{% endif %}"
    )
    thinking = answer("One") | {"reasoning_content": "hm"}
    for said, learnt in ((answer("One"), "One<|im_end|>"), (thinking, "hm</think>One<|im_end|>")):
        found = render(tokenizers["ChatML"], Conversation([user("a"), said]), given=source)
        (span,) = found.spans
        assert found.text[slice(*span)].removeprefix("</think>") == learnt


def test_tools_stand_where_the_template_writes_them_and_move_its_last_question(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    asked = [user("Grow."), answer("", "grow"), {"role": "tool", "content": "ok"}, answer("So.")]
    found = render(
        tokenizers["Mistral"], Conversation([*asked, user("Now?"), answer("No")], [TOOL])
    )
    assert found.way is Way.LAST
    assert found.text.count("[AVAILABLE_TOOLS]") == 1
    assert found.text.endswith("[/AVAILABLE_TOOLS][INST]Now?[/INST]No</s>")


def test_a_template_that_drops_calls_of_tools_is_refused_by_name(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    with pytest.raises(
        CorpusError, match=r"Gemma drops calls of tools, such as that of grow, .*turn 1"
    ):
        render(tokenizers["Gemma"], CALLS[0])
    forgets = CHATML.source.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
    row = Conversation([user("Grow."), answer("", "grow"), answer("", "grow", "fell")], [TOOL])
    with pytest.raises(
        CorpusError, match=r"corpus\.chat_template drops calls .*that of fell, .*turn 2 "
    ):
        render(tokenizers["ChatML"], row, given=forgets)


def test_a_template_that_drops_what_an_assistant_says_is_refused(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    """As those do that want the parts of a content, and are given a text."""
    source = "{% for m in messages %}{{ m.role }}{{ m.content[0].text }}<|im_end|>{% endfor %}"
    with pytest.raises(CorpusError, match="drops what an assistant says in silence: turn 1"):
        render(tokenizers["ChatML"], TALK[0], given=source)


def test_a_template_that_wants_arguments_as_text_is_given_text(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    source = CHATML.source.replace("call.function | tojson", "call.function.arguments")
    found = render(tokenizers["ChatML"], CALLS[0], given=source)
    (span,) = found.spans
    assert '<tool_call>{"tree": "Eiche — 木"}</tool_call>' in found.text[slice(*span)]


def test_a_template_of_the_config_stands_in_for_the_tokenizers_own(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    file = tmp_path / "training.jinja"
    file.write_text(MARKED_CHATML.source)
    rows = [TALK[2]]
    documents = Documents(
        "values", np.arange(1), lambda row: rows[row], lambda row: ("somewhere", row)
    )
    for given in (str(file), MARKED_CHATML.source):
        section = CorpusSection(dataset="somewhere", format="chat", chat_template=given)
        account = Account()
        (tokens,) = tokenise(documents, section, tokenizers["Qwen3"], account=account)
        assert account.ways == {Way.MARKS: 1}
        learnt = tokenizers["Qwen3"].decode(tokens.ids[tokens.is_label])
        assert learnt == "b<|im_end|>d<|im_end|>" + "f " * 9 + "<|im_end|>"
    section = CorpusSection(dataset="somewhere", format="chat", chat_template="absent.jinja")
    with pytest.raises(CorpusError, match=r"'absent\.jinja', which is no template and no file"):
        list(tokenise(documents, section, tokenizers["Qwen3"]))


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% generation %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% set t %}{% generation %} {{ m.content }} {% endgeneration %}"
        "{% endset %}{{ t | trim }}{% endfor %}",
    ],
)
def test_marks_that_cannot_be_followed_are_refused(
    source: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    with pytest.raises(CorpusError, match=r"marks of the template of .* cannot be followed"):
        render(tokenizers["ChatML"], TALK[0], given=source)


def test_marks_in_a_macro_are_where_its_text_is(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    source = (
        "{% macro say(m) %}[{{ m.role }}]\n  {% generation %}\n{{ m.content }}|\n"
        "  {%- endgeneration %}\n{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    found = render(tokenizers["ChatML"], TALK[0], given=source)
    assert [found.text[start:stop] for start, stop in found.spans] == [
        "Which tree?|",
        "An old oak.|",
    ]


def test_templates_are_rendered_a_few_times_for_each_message() -> None:
    class Counting:
        name_or_path, chat_template = "counting", "it has one"
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}
        calls = 0

        def apply_chat_template(self, turns: list[dict[str, str]], **_settings: Any) -> str:
            self.calls += 1
            return "".join(turn["content"] for turn in turns)

    row = Conversation([user("a"), answer("b")] * 50)
    tokenizer: Any = Counting()
    assert len(render(tokenizer, row).spans) == 50
    assert tokenizer.calls <= 2 * 50 + 5
