"""Chat templates: a conversation becomes text, and the parts of it that an assistant wrote.

There are three ways to tell these parts; `Way` names them. A template that marks them with
`{% generation %}` is rendered twice, with its marks and without. Any other is rendered up to an
assistant's message and through it; in a long conversation some of them, from which `borders` tells
the others. Where a template rewrites earlier messages, as those do that drop earlier reasoning,
only the last one can be told so.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stillhouse.config import CorpusSection
from stillhouse.config.paths import is_template
from stillhouse.errors import CorpusError
from stillhouse.sequences.bad_rows import BadRowError, require_text
from stillhouse.sequences.borders import Answer, Borders, Span, anchors_of
from stillhouse.sequences.conversations import Conversation
from stillhouse.sequences.cpu_limit import CpuLimitError, cpu_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FEW_ANSWERS = 4  # of which each is rendered
TEMPLATE_LIMIT_S = 10.0  # CPU time to render one conversation, which takes milliseconds
# Generation prompts may begin, or skip, the reasoning of an answer that has none, or has some.
_THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})
_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_BEGIN, _END = "\ue0f0", "\ue0f1"  # of a marked part; no standard gives these characters a meaning


class Way(StrEnum):
    """How the parts of a conversation that are learnt were told from the others."""

    MARKS = "marks"
    PREFIXES = "prefixes"
    LAST = "last"

    @property
    def words(self) -> str:
        return _WAYS[self]


_WAYS = {
    Way.MARKS: "what the template marks with {% generation %} is learnt",
    Way.PREFIXES: "every assistant's message is learnt",
    Way.LAST: "the last assistant's message alone is learnt: the template rewrites earlier ones",
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text, and the ascending, disjoint spans of it that are learnt."""

    text: str
    spans: Sequence[Span]
    way: Way


def template_text(section: CorpusSection) -> str | None:
    """The template that a config gives, as a text or as the path of a file; None: the tokenizer's
    own. Raises CorpusError where the file cannot be read."""
    given = section.chat_template
    if given is None or is_template(given):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"corpus.chat_template is {given!r}, which is no template and no file that can be read "
            f"({error}); give the path of a Jinja file, or the template itself"
        ) from None


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in use. `given` stands in for the tokenizer's own."""

    tokenizer: "PreTrainedTokenizerFast"
    given: str | None = None
    limit_s: float = TEMPLATE_LIMIT_S
    # the kinds of an assistant's messages that the template is known to write
    _written: set[tuple[int, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not (self.given or self.tokenizer.chat_template):
            raise CorpusError(
                f"the tokenizer {self.tokenizer.name_or_path} has no chat template; use that of an "
                'instruction-tuned model, set corpus.chat_template, or set corpus.format = "text"'
            )

    @property
    def name(self) -> str:
        if self.given is not None:
            return "the template of corpus.chat_template"
        return f"the chat template of {self.tokenizer.name_or_path}"

    def rendered(self, conversation: Conversation) -> Rendered:
        """The text of a conversation, and what is learnt of it.

        Raises BadRowError where the template refuses it, or nothing in it can be learnt;
        CorpusError where the template drops what is learnt, or takes longer than the limit.
        """
        # What there is to learn: a message before which nothing is asked answers nothing.
        messages = conversation.messages
        answers = [n for n, each in enumerate(messages) if each["role"] == "assistant" and n]
        if not answers:
            raise BadRowError(
                "it has no assistant's turn that answers another, so nothing to learn from; remove "
                "such rows"
            )
        text = self._text_or_none(conversation)
        if text is None:  # perhaps for arguments of calls that are objects
            conversation = conversation.with_texts_as_arguments()
            messages, text = conversation.messages, self._text(conversation)
        require_text(text)
        self._require_written(conversation, text)

        # In the first way that tells it.
        source = self._source(conversation)
        if _MARK.search(source):
            return Rendered(text, self._marked(conversation, text, source), Way.MARKS)
        told = self._by_prefixes(conversation, text, answers)
        if told is not None:
            return Rendered(text, told, Way.PREFIXES)
        last = answers[-1]
        upto = Conversation(messages[: last + 1], conversation.tools)
        text = self._text(upto)
        told = self._by_prefixes(upto, text, [last])
        if told is None:
            raise BadRowError(
                f"under {self.name} the conversation up to turn {last} is not a prefix of the "
                "whole, so an assistant's words cannot be told from the others; give a template "
                "that only appends as corpus.chat_template, or one with {% generation %} marks"
            )
        return Rendered(text, told, Way.LAST)

    def prompt(self, conversation: Conversation) -> str:
        """The text of a conversation up to where an assistant's turn begins. Raises as `rendered`
        does."""
        text = self._text_or_none(conversation, prompted=True)
        if text is None:  # perhaps for arguments of calls that are objects
            text = self._text(conversation.with_texts_as_arguments(), prompted=True)
        return require_text(text)

    def _marked(self, conversation: Conversation, text: str, source: str) -> list[Span]:
        """The spans that a template marks: it is rendered with a character for each mark, which
        changes nothing else."""
        marked = self._text(conversation, template=_MARK.sub(_shown, source))
        pieces = re.split(f"([{_BEGIN}{_END}])", marked)
        borders = pieces[1::2]
        if "".join(pieces[::2]) != text or borders != [_BEGIN, _END] * (len(borders) // 2):
            raise BadRowError(
                f"the {{% generation %}} marks of {self.name} cannot be followed: they are nested, "
                "or it changes the text that they enclose"
            )
        ends = list(accumulate(map(len, pieces[::2])))
        return [span for span in zip(ends[:-1:2], ends[1::2], strict=False) if span[0] < span[1]]

    def _by_prefixes(
        self, conversation: Conversation, text: str, answers: Sequence[int]
    ) -> list[Span] | None:
        """The span of each answer in the text of the conversation; None where the text before one
        of them is another without what follows.

        Of many answers the last, and every one whose count is a power of two, are rendered, which
        takes time by the length of the text. So are those that `Borders` cannot tell from them.
        """
        ends_of_turn = tuple(
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        )
        is_long = len(answers) > _FEW_ANSWERS
        anchors = anchors_of(conversation, text, self._text_or_none) if is_long else {}
        borders = Borders(conversation, text, anchors=anchors, ends_of_turn=ends_of_turn)
        spans = []
        for count, number in enumerate(answers, 1):
            is_tried = count & (count - 1) == 0 or number == answers[-1]
            span = None if is_tried else borders.span_of(number)
            if span is None:
                answer = self._answer(conversation, text, number, ends_of_turn=ends_of_turn)
                if answer is None:
                    return None
                borders.learn(number, answer)
                span = answer.span
            spans.append(span)
        return spans

    def _answer(
        self, conversation: Conversation, text: str, number: int, *, ends_of_turn: tuple[str, ...]
    ) -> Answer | None:
        """The answer `messages[number]`. It begins at the end of `messages[:number]` with the
        generation prompt, and ends at the end of `messages[:number + 1]`."""
        messages, tools = conversation.messages, conversation.tools
        before = Conversation(messages[:number], tools)
        is_last = number == len(messages) - 1
        through = text if is_last else self._text(Conversation(messages[: number + 1], tools))
        prompts = []
        for settings in _THINKING:
            prompts.append(self._text(before, prompted=True, settings=settings))
            if through.startswith(prompts[-1]):
                break
        else:
            return None
        if not text.startswith(through):
            return None
        trimmed = through.rstrip()  # ChatML has a newline behind the end token: not a label
        end = len(trimmed) if trimmed.endswith(ends_of_turn) else len(through)
        return Answer(prompts, (len(prompts[-1]), end))

    def _require_written(self, conversation: Conversation, text: str) -> None:
        """Raise CorpusError where the text is the same without the last call of an assistant's
        message, or where it ends with one without calls, and is the same with another content.

        Templates decide by the kind of a message, so one of each kind is tried.
        """
        for number, message in enumerate(conversation.messages):
            # Of a kind that was not tried yet.
            calls = message.get("tool_calls", [])
            is_last = number == len(conversation.messages) - 1
            reasons = "reasoning_content" in message
            kind = (min(len(calls), 2), bool(message["content"]), is_last, reasons)
            if message["role"] != "assistant" or kind in self._written or not (calls or is_last):
                continue

            # Changed in what has to be written.
            changed = {**message, "content": message["content"] + "a"}
            what = "what an assistant says"
            if calls:
                changed = {**message, "tool_calls": calls[:-1] or None}
                what = f"calls of tools, such as that of {calls[-1]['function']['name']},"
            messages = [*conversation.messages]
            messages[number] = {name: each for name, each in changed.items() if each is not None}
            if text == self._text_or_none(Conversation(messages, conversation.tools)):
                raise CorpusError(
                    f"{self.name} drops {what} in silence: turn {number} is rendered the same "
                    "without it, so a student would learn to say nothing. Give a template that "
                    "writes it as corpus.chat_template, or leave such rows out"
                )
            self._written.add(kind)

    def _text_or_none(self, conversation: Conversation, *, prompted: bool = False) -> str | None:
        """The text; None where the template refuses it."""
        try:
            return self._text(conversation, prompted=prompted)
        except BadRowError:
            return None

    def _source(self, conversation: Conversation) -> str:
        """The template's text; a tokenizer may have one of its own for tools."""
        own = self.given or self.tokenizer.chat_template
        if isinstance(own, str):
            return own
        return str(self.tokenizer.get_chat_template(tools=_tools_of(conversation)))

    def _text(
        self,
        conversation: Conversation,
        *,
        template: str | None = None,
        prompted: bool = False,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The conversation as text, with the generation prompt behind it if `prompted`; `settings`
        are the template's own."""
        with self._limited(len(conversation.messages)):
            return str(
                self.tokenizer.apply_chat_template(
                    list(conversation.messages),
                    tools=_tools_of(conversation),
                    chat_template=template or self.given,
                    tokenize=False,
                    add_generation_prompt=prompted,
                    **settings,
                )
            )

    @contextmanager
    def _limited(self, num_messages: int) -> Iterator[None]:
        """A rendering. Raises BadRowError where the template does, CorpusError at the limit."""
        try:
            with cpu_limit(self.limit_s):
                yield
        except CpuLimitError:
            raise CorpusError(
                f"{self.name} took more than {self.limit_s:g} s of CPU time for its first "
                f"{num_messages} turns; wanted: milliseconds. Look for a loop without end in it, "
                "or use the template of another model"
            ) from None
        except Exception as error:  # a template is a foreign program, which may raise anything
            raise BadRowError(
                f"{self.name} refuses its first {num_messages} turns: {error}"
            ) from error


def _tools_of(conversation: Conversation) -> list[Any] | None:
    return list(conversation.tools) or None


def _shown(mark: re.Match[str]) -> str:
    """A mark as a block that writes a character, for Jinja strips white space around blocks."""
    before, is_end, after = mark.groups()
    return f"{{%{before} if true %}}{_END if is_end else _BEGIN}{{% endif {after}%}}"
