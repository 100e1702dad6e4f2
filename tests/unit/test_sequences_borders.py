"""Answers of long conversations: told from some that are rendered, and the same as by a rule that
looks at the rendered text alone, under templates that write all answers alike and others."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from helpers.chattemplates import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN3, Template
from helpers.models import make_tokenizer
from stillhouse.sequences.chat import ChatTemplate, Rendered, Way
from stillhouse.sequences.conversations import Conversation

TEMPLATES = {"ChatML": CHATML, "Llama 3": LLAMA3, "Mistral": MISTRAL, "Gemma": GEMMA}

# each heading has the number of its message
NUMBERED = Template(
    "{% for m in messages %}{{ '#' ~ loop.index ~ m.role ~ ': ' ~ m.content ~ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '#' ~ (messages | length + 1) ~ 'assistant: ' }}"
    "{% endif %}",
    r"#\d+assistant: (.*?<\|im_end\|>)",
)
# what it writes before a message hangs on the content of the message, and on that of the answer
LOOKS_INSIDE = Template(
    "{% for m in messages %}{{ '[' ~ m.role ~ ']' ~ m.content.replace('said', 'told') }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    r"\[assistant\](.*?<\|im_end\|>)",
)
# no answer ends with a token, and white space at its end is its own
BARE = Template(
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' ~ m.content }}{% else %}"
    "{{ '\nU: ' ~ m.content ~ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}",
    r"A: (.*?)(?=\nU: |\Z)",
)
# it begins the reasoning of an answer, unless it is told not to
REASONS = Template(
    "{% for m in messages %}{{ '[' ~ m.role ~ ']' }}{% if m.role == 'assistant' %}"
    "{{ '<think>' ~ m.reasoning_content ~ '</think>' if m.reasoning_content else '' }}{% endif %}"
    "{{ m.content ~ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '[assistant]' ~ ('<think>' if enable_thinking | default(true) else '') }}{% endif %}",
    r"\[assistant\](?:<think>)?(.*?<\|im_end\|>)",
)


class Counting:
    """A tokenizer that counts the characters that it renders."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self.num_rendered = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: Any, **settings: Any) -> str:
        text = str(self._tokenizer.apply_chat_template(messages, **settings))
        self.num_rendered += len(text)
        return text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer(folder, vocab_size=400, chat_template=CHATML.source)


def conversation(num_answers: int, *, seed: int = 0, calls: bool = False) -> Conversation:
    """Answers of every length, to questions and, with `calls`, to results of tools."""
    random = np.random.default_rng(seed)

    def words() -> str:
        before, behind = random.choice(["", "", "", " ", "\n"], 2).tolist()
        return str(before + "said… 木 \n" * int(random.integers(1, 5)) + "so." + behind)

    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for number in range(num_answers):
        is_result = calls and messages[-1].get("tool_calls")
        messages.append({"role": "tool" if is_result else "user", "content": words()})
        said: dict[str, Any] = {"role": "assistant", "content": words()}
        if calls and random.integers(0, 2):
            function = {"name": "grow", "arguments": {"number": number}}
            said |= {"content": "", "tool_calls": [{"type": "function", "function": function}]}
        messages.append(said)
    return Conversation(messages[: -1 if seed % 2 else None])  # every other one ends with a user


def rendered(tokenizer: Any, template: Template, row: Conversation) -> Rendered:
    return ChatTemplate(tokenizer, given=template.source).rendered(row)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("calls", [False, True])
def test_answers_of_long_conversations_are_what_an_assistant_wrote(
    name: str, calls: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = TEMPLATES[name]
    calls &= name != "Gemma"  # it knows none
    tokenizer.add_special_tokens({"additional_special_tokens": list(template.tokens)})
    for seed in range(4):
        found = rendered(tokenizer, template, conversation(23, seed=seed, calls=calls))
        assert found.way is Way.PREFIXES
        assert found.spans == template.spans(found.text)


@pytest.mark.parametrize("template", [NUMBERED, LOOKS_INSIDE, BARE, REASONS])
def test_answers_that_a_template_begins_in_several_ways_are_told_too(
    template: Template, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = conversation(20)
    for number, each in enumerate(row.messages):
        each["content"] = each["content"].strip()
        if number % 3 == 0:
            each["reasoning_content"] = "hm"
    found = rendered(tokenizer, template, row)
    assert found.way is Way.PREFIXES
    assert found.spans == template.spans(found.text)


def test_where_any_answer_is_rewritten_the_last_one_alone_is_learnt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """By its place in the conversation, or since it has reasoning that is dropped later."""
    early_answers = "(message.content if loop.last or message.role == 'user' or loop.index0 < 30"
    late = CHATML.source.replace("message.content }}", f"{early_answers} else 'x') }}}}")
    thinks = CHATML.source.replace(
        "message.content }}",
        "(message.content if loop.last else message.content.split('</think>') | last) }}",
    )
    thinking = conversation(40)
    thinking.messages[22]["content"] = "<think>hm</think>Two"
    for source, row in (
        (late, conversation(40)),
        (QWEN3.source, conversation(40)),
        (thinks, thinking),
    ):
        found = rendered(tokenizer, Template(source, CHATML.wrote), row)
        assert found.way is Way.LAST
        assert found.spans == CHATML.spans(found.text)[-1:]


@pytest.mark.parametrize("calls", [False, True])
def test_characters_that_are_rendered_grow_with_those_of_the_conversation(
    calls: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    shares = []
    for num_answers in (20, 200):
        counting: Any = Counting(tokenizer)
        found = rendered(counting, CHATML, conversation(num_answers, calls=calls))
        assert len(found.spans) == num_answers
        shares.append(counting.num_rendered / len(found.text))
    assert shares[1] < 1.5 * shares[0] < 25


def test_a_conversation_with_the_characters_of_marks_is_told_as_any_other(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = conversation(12)
    row.messages[5]["content"] = "\ue0f23\ue0f2"
    found = rendered(tokenizer, CHATML, row)
    assert found.spans == CHATML.spans(found.text)


def test_the_rule_of_each_template_finds_every_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Or the comparisons above could be of nothing."""
    for template in (*TEMPLATES.values(), NUMBERED, LOOKS_INSIDE, BARE, REASONS):
        found = rendered(tokenizer, template, conversation(9))
        assert len(re.findall(template.wrote, found.text, re.DOTALL)) == 9
