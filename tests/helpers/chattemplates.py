"""Chat templates in the manner of well-known models, each with a rule that says which characters of
a rendered text an assistant wrote. The rules look at the text alone."""

import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from helpers.models import make_tokenizer


@dataclass(frozen=True)
class Template:
    """`wrote` has a group that an assistant wrote; `tokens` are special ones of the template."""

    source: str
    wrote: str
    tokens: tuple[str, ...] = ()

    def tokenizer(self, directory: Path) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(directory, vocab_size=400, chat_template=self.source)
        tokenizer.name_or_path = str(directory)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.tokens)})
        return tokenizer

    def spans(self, text: str) -> list[tuple[int, int]]:
        return [found.span(1) for found in re.finditer(self.wrote, text, re.DOTALL)]


def _lines(*lines: str) -> str:
    """A template of statements, whose white space is written in them."""
    return "".join(line.strip() for line in lines)


_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_TOOLS = _lines(
    "{% if tools %}{{ '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}",
    "{% endif %}",
)
_CALLS = _lines(
    "{% for call in message.tool_calls or [] %}",
    "{{ '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}",
)
_IN_CHATML = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"

CHATML = Template(
    _TOOLS
    + _lines(
        "{% for message in messages %}",
        "{{ '<|im_start|>' + message.role + '\\n' + message.content }}",
        _CALLS,
        "{{ '<|im_end|>\\n' }}{% endfor %}",
        _PROMPT,
    ),
    _IN_CHATML,
)
MARKED_CHATML = Template(
    _TOOLS
    + _lines(
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}",
        _CALLS,
        "{{ '<|im_end|>' }}{%- endgeneration -%}",
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}",
        _PROMPT,
    ),
    _IN_CHATML,
)
# Of messages before the last question it drops the reasoning, and the last answer always has a
# place for it. A tool's result is a user's message.
QWEN3 = Template(
    _TOOLS
    + _lines(
        "{% set ns = namespace(asked=0) %}",
        "{% for message in messages %}{% if message.role == 'user' %}",
        "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}",
        "{% for message in messages %}",
        "{% if message.role == 'assistant' %}",
        "{% set said = message.content.split('</think>') | last %}",
        "{% set thought = message.content[:message.content | length - said | length] %}",
        "{{ '<|im_start|>assistant\\n' }}",
        "{% if loop.index0 > ns.asked and (loop.last or thought) %}",
        "{{ (thought or '<think>\\n\\n</think>') + '\\n\\n' }}{% endif %}",
        "{{ said.lstrip() }}",
        _CALLS,
        "{{ '<|im_end|>\\n' }}",
        "{% elif message.role == 'tool' %}",
        "{{ '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response>' }}",
        "{{ '<|im_end|>\\n' }}",
        "{% else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}",
        "{% endif %}{% endfor %}",
        _PROMPT,
    ),
    _IN_CHATML,
)
LLAMA3 = Template(
    _lines(
        "{% macro head(role) %}",
        "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}",
        "{{ '<|begin_of_text|>' }}",
        "{% for message in messages %}",
        "{% if message.role == 'tool' %}",
        "{{ head('ipython') + message.content | tojson + '<|eot_id|>' }}",
        "{% elif message.tool_calls %}{% if message.tool_calls | length > 1 %}",
        "{{ raise_exception('one call at a time') }}{% endif %}",
        "{% set call = message.tool_calls[0].function %}",
        "{{ head('assistant') + '{\"name\": \"' + call.name + '\", \"parameters\": ' }}",
        "{{ call.arguments | tojson + '}<|eot_id|>' }}",
        "{% else %}{{ head(message.role) }}",
        "{% if loop.first and tools %}{{ tools | tojson + '\\n\\n' }}{% endif %}",
        "{{ message.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}",
        "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}",
    ),
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
# Tools stand before the last question, so its text changes with every question.
MISTRAL = Template(
    _lines(
        "{% set ns = namespace(asked=-1) %}",
        "{% for message in messages %}{% if message.role == 'user' %}",
        "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}",
        "{{ '<s>' }}{% for message in messages %}",
        "{% if message.role == 'system' %}{{ '[SYSTEM_PROMPT]' + message.content }}",
        "{{ '[/SYSTEM_PROMPT]' }}",
        "{% elif message.role == 'user' %}{% if tools and loop.index0 == ns.asked %}",
        "{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}",
        "{{ '[INST]' + message.content + '[/INST]' }}",
        "{% elif message.role == 'tool' %}",
        "{{ '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}",
        "{% elif message.tool_calls %}{{ '[TOOL_CALLS][' }}{% for call in message.tool_calls %}",
        "{{ call.function | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}{{ ']</s>' }}",
        "{% else %}{{ message.content + '</s>' }}{% endif %}{% endfor %}",
    ),
    r"(?:\[/INST\]|\[/TOOL_RESULTS\])(.*?</s>)",
    ("<s>", "</s>"),
)
# It knows no tools, no calls of them, and no system: that stands in the first question.
GEMMA = Template(
    _lines(
        "{{ '<bos>' }}{% set ns = namespace(first='') %}{% for message in messages %}",
        "{% if message.role == 'system' %}{% set ns.first = message.content + '\\n\\n' %}",
        "{% else %}{{ '<start_of_turn>' }}",
        "{{ 'model' if message.role == 'assistant' else 'user' }}",
        "{{ '\\n' + ns.first + message.content | trim + '<end_of_turn>\\n' }}",
        "{% set ns.first = '' %}{% endif %}{% endfor %}",
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ),
    r"<start_of_turn>model\n(.*?<end_of_turn>)",
    ("<bos>", "<start_of_turn>", "<end_of_turn>"),
)
