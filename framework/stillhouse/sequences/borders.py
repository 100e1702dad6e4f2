"""Borders of answers: where they begin and end in the text of a conversation, told from what a
template writes round other answers.

To render a conversation up to every one of its answers takes time by the square of their number.
Most templates write one text before every answer to a user, and one before a user's next message:
so some answers are rendered, and the others are told from them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from stillhouse.sequences.conversations import Conversation, Message

Span = tuple[int, int]  # half-open, of characters

_MARK = "\ue0f2"  # no standard gives this character a meaning


class Answer(NamedTuple):
    """An answer that was rendered: the generation prompts that were tried, of which the last one
    stands before it, and its span."""

    prompts: Sequence[str]
    span: Span


def anchors_of(
    conversation: Conversation, text: str, render: Callable[[Conversation], str | None]
) -> dict[int, Span]:
    """The spans in the text of the contents that no assistant wrote, by the numbers of their
    messages. Those that are empty, or not in the text, are left out.

    The conversation is rendered once, with a mark in the place of each content. That proves the
    spans: with the contents back in their places, trimmed or not, it has to be the text. Where it
    is another one, as under a template that looks into contents, there are no anchors.
    """
    # with marks
    messages = conversation.messages
    with_marks = [
        each
        if each["role"] == "assistant" or not each["content"].strip()
        else {**each, "content": f"{_MARK}{number}{_MARK}"}
        for number, each in enumerate(messages)
    ]
    found = None if _MARK in text else render(Conversation(with_marks, conversation.tools))
    if found is None:
        return {}
    first, *rest = re.split(f"{_MARK}([0-9]+){_MARK}", found)
    numbers = [int(each) for each in rest[::2]]
    if not text.startswith(first) or numbers != sorted(set(numbers)):
        return {}

    # with the contents back in their places
    spans, at = {}, len(first)
    for number, literal in zip(numbers, rest[1::2], strict=True):
        content = messages[number]["content"]
        forms = (each for each in (content, content.strip()) if text.startswith(each + literal, at))
        form = next(forms, None)
        if form is None:
            return {}
        spans[number] = (at, at + len(form))
        at += len(form) + len(literal)
    return spans if at == len(text) else {}


class Borders:
    """What is known of the borders of answers in one text. An answer is told where it stands
    between two anchors, the text beside them is what was learnt for messages of their roles, and
    all that the answer says is there: a template may drop the reasoning of earlier answers.
    """

    def __init__(
        self,
        conversation: Conversation,
        text: str,
        *,
        anchors: Mapping[int, Span],
        ends_of_turn: tuple[str, ...],
    ):
        """`ends_of_turn`: the tokens with which an answer may end."""
        self._messages = conversation.messages
        self._roles = [each["role"] for each in conversation.messages]
        self._text, self._anchors, self._ends_of_turn = text, anchors, ends_of_turn
        # by the role of the message before an answer: what its prompts end with, in their order
        self._prompts: dict[str, list[str]] = {}
        # by the role of the message behind an answer: what stands between them
        self._between: dict[str, tuple[str, bool]] = {}

    def learn(self, number: int, answer: Answer) -> None:
        """Learn the borders of an answer that was rendered."""
        before, behind = self._anchors.get(number - 1), self._anchors.get(number + 1)
        if before is not None:
            upto = self._text[: before[1]]
            if all(each.startswith(upto) for each in answer.prompts):
                known = self._prompts.setdefault(self._roles[number - 1], [])
                known[: len(answer.prompts)] = [each[len(upto) :] for each in answer.prompts]
        if behind is not None:
            between = self._text[answer.span[1] : behind[0]]
            has_end = self._text.endswith(self._ends_of_turn, 0, answer.span[1])
            self._between[self._roles[number + 1]] = (between, has_end)

    def span_of(self, number: int) -> Span | None:
        """The span of the answer; None where it has to be rendered."""
        before, behind = self._anchors.get(number - 1), self._anchors.get(number + 1)
        if before is None or behind is None:
            return None
        # as others of its kind
        prompts = self._prompts.get(self._roles[number - 1], [])
        prompt = next((each for each in prompts if self._text.startswith(each, before[1])), None)
        between, has_end = self._between.get(self._roles[number + 1], (None, False))
        if prompt is None or between is None:
            return None
        start, stop = before[1] + len(prompt), behind[0] - len(between)
        if start > stop or not self._text.startswith(between, stop):
            return None
        # whole, and ended alike
        said = self._text[before[1] : stop]
        is_whole = all(each.strip() in said for each in _texts_of(self._messages[number]))
        ends_alike = has_end == (said if has_end else said.rstrip()).endswith(self._ends_of_turn)
        return (start, stop) if is_whole and ends_alike else None


def _texts_of(message: Message) -> list[str]:
    """What a message says: all of its texts, and the names of the tools that it calls."""
    texts = [each for name, each in message.items() if name != "role" and isinstance(each, str)]
    return texts + [call["function"]["name"] for call in message.get("tool_calls", [])]
