"""Conversations: what a row of a chat corpus holds, in each of the forms in use, as one value.

- messages of {role, content}, as OpenAI's API has them: tools, calls of tools, content parts of
  text
- ShareGPT: messages of {from, value}
- a question and its answer in two columns, such as prompt and completion

Every form becomes messages with a text `content`; calls of tools have their arguments as an object,
which is what chat templates expect.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from stillhouse.sequences.bad_rows import BadRowError

Message = dict[str, Any]

_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("question", "answer"),
)
_ROLES = {  # of ShareGPT
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_EXCERPT = 200  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, each with a text `role` and a text `content`, and the tools that may be called."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()

    def with_texts_as_arguments(self) -> "Conversation":
        """The same for a template that wants the arguments of a call as a text of JSON."""
        messages = []
        for message in self.messages:
            calls = [
                {**call, "function": {**one, "arguments": _as_json(one["arguments"])}}
                for call in message.get("tool_calls", [])
                for one in [call["function"]]
            ]
            messages.append({**message, "tool_calls": calls} if calls else message)
        return Conversation(messages, self.tools)


class Form(NamedTuple):
    """How the rows of a data set hold conversations."""

    words: str  # for people
    columns: tuple[str, ...]  # all that are read
    document: Callable[[Mapping[str, Any]], Any]  # of these columns of a row; raises BadRowError


def form_of(columns: Collection[str], column: str | None) -> Form | None:
    """The form of a data set with these columns; None where it has none that is known. `column`
    names the one that holds the messages; None: it is found by its name."""
    # A column of messages.
    lists = _LISTS if column is None else (column,)
    found = next((name for name in lists if name in columns), None)
    if found is not None:
        others = tuple(name for name in ("tools", "system") if name in columns and name != found)
        return Form(
            f"messages of column '{found}'", (found, *others), partial(_from_messages, found)
        )

    # Two columns of texts.
    pair = next((pair for pair in _PAIRS if set(pair) <= set(columns)), None)
    if pair is None or column is not None:
        return None
    question, answer = pair
    more = ("input",) if question == "instruction" and "input" in columns else ()
    others = tuple(name for name in ("system",) if name in columns)
    asked = f"{question} and {more[0]}" if more else question
    return Form(
        f"column {asked} as the user, {answer} as the assistant",
        (question, *more, answer, *others),
        partial(_from_pair, question, answer),
    )


def _from_pair(question: str, answer: str, row: Mapping[str, Any]) -> Conversation:
    """A user's message and an assistant's; an `input` stands below its instruction."""
    for name in (question, answer):
        if not isinstance(row[name], str):
            raise BadRowError(f"it has {type(row[name]).__name__} in column '{name}'; wanted: text")
    asked = f"{row[question]}\n{row.get('input') or ''}".strip() if "input" in row else None
    return Conversation(
        [
            *_system(row),
            {"role": "user", "content": row[question] if asked is None else asked},
            {"role": "assistant", "content": row[answer]},
        ]
    )


def _from_messages(column: str, row: Mapping[str, Any]) -> Conversation:
    """The messages of a column, in either form, and the tools beside them."""
    # Their form.
    turns = row[column]
    if not isinstance(turns, list):
        raise BadRowError(
            f"column '{column}' is not a list of messages, each with a text 'role' and a text "
            f"'content'; found {str(turns)[:_EXCERPT]}"
        )
    is_sharegpt = any(isinstance(turn, dict) and "from" in turn for turn in turns)
    read = _from_sharegpt if is_sharegpt else _from_openai

    # One after the other.
    messages = []
    for number, turn in enumerate(turns):
        try:
            messages.append(read(turn))
        except BadRowError as error:
            raise BadRowError(
                f"column '{column}' is not a list of messages, each with a text 'role' and a text "
                f"'content'; found as turn {number}: {str(_as_in_its_file(turn))[:_EXCERPT]}"
                f"; {error}"
            ) from None
    if is_sharegpt and messages[0]["role"] != "system":
        messages = [*_system(row), *messages]
    return Conversation(messages, _tools(row.get("tools")))


def _system(row: Mapping[str, Any]) -> list[Message]:
    """The message of a column `system`; none where there is none, or it is empty."""
    text = row.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _from_sharegpt(turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise BadRowError("wanted a text 'from' and a text 'value'")
    role = _ROLES.get(turn.get("from", ""))
    if role is None:
        raise BadRowError(f"'from' is none of {', '.join(_ROLES)}")
    return {"role": role, "content": turn["value"]}


def _from_openai(turn: Any) -> Message:
    """A message without its empty fields: a table gives every message the fields of all others."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise BadRowError("wanted a text 'role'")
    message = {name: value for name, value in turn.items() if value is not None}
    calls = _calls(message.pop("tool_calls", None))
    if "function_call" in message:
        raise BadRowError("'function_call' is not read; write it as 'tool_calls'")
    content = message.get("content", "" if calls else None)
    message["content"] = _text(content)
    return message | ({"tool_calls": calls} if calls else {})


def _text(content: Any) -> str:
    """A content as text: a text as it is, and parts of text one after the other."""
    if isinstance(content, str):
        return content
    if content is None:
        raise BadRowError("give it a text, or leave such rows out")
    if not isinstance(content, list):
        raise BadRowError(f"'content' is a {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "str") or not isinstance(text, str):
            raise BadRowError(f"a part of its content is of type '{kind}'; only text is read")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Calls of tools, each with its arguments as an object. Two forms are in use: with the call in
    a field `function`, and without."""
    found = []
    for call in _list_of_objects(calls, "tool_calls"):
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadRowError("a call in 'tool_calls' has no name of a function")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise BadRowError(f"the arguments of its call of {name} are not JSON") from None
        if not isinstance(arguments, dict):
            raise BadRowError(f"the arguments of its call of {name} are not an object")
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        function = {"name": name, "arguments": arguments}
        found.append({"type": "function", **identity, "function": function})
    return found


def _as_json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _tools(tools: Any) -> list[dict[str, Any]]:
    return _list_of_objects(tools, "tools")


def _list_of_objects(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects, or one as a text of JSON; empty for None and an empty text."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRowError(f"'{name}' is a text that is not JSON") from None
    value = value or []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise BadRowError(f"'{name}' is not a list of objects")
    return value


def _as_in_its_file(turn: Any) -> Any:
    """A turn without the fields that only other turns have: a table adds them to it, as None."""
    if not isinstance(turn, dict):
        return turn
    return {name: value for name, value in turn.items() if value is not None or name == "content"}
