"""Conversations: lists of messages with a role and a content, as a corpus for chat holds them, and
how to convert the other forms in use."""

from collections.abc import Collection
from typing import Any

from stillhouse.errors import CorpusError

_PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("question", "answer"),
)
_EXCERPT = 200  # characters of a value in a message


def checked_messages(messages: Any, where: str, column: str) -> list[dict[str, Any]]:
    """The messages of a row, without their empty fields; a field of None is empty.

    Raises CorpusError, with the turn at fault, where a role or a content is not a text.
    """
    wanted = (
        f"{where}: column '{column}' is not a list of messages, each with a text 'role' and "
        "a text 'content'; found"
    )
    if not isinstance(messages, list):
        raise CorpusError(f"{wanted} {str(messages)[:_EXCERPT]}")
    for number, turn in enumerate(messages):
        if not (
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
        ):
            excerpt = str(_as_in_its_file(turn))[:_EXCERPT]
            raise CorpusError(f"{wanted} as turn {number}: {excerpt}{_cure_of_turn(turn, column)}")
    return [{name: value for name, value in turn.items() if value is not None} for turn in messages]


def cure_of_columns(columns: Collection[str]) -> str | None:
    """How to make conversations of two columns that hold a question and its answer; None where no
    two do."""
    for question, answer in _PAIRS:
        if question in columns and answer in columns:
            asked = f'row["{question}"]'
            if question == "instruction" and "input" in columns:
                asked = r'(row["instruction"] + "\n" + (row["input"] or "")).strip()'
            messages = (
                f'{{"role": "user", "content": {asked}}}, {{"role": "assistant", '
                f'"content": row["{answer}"]}}'
            )
            return f"make conversations of {question} and {answer}; {_mapped(f'[{messages}]')}"
    return None


def _cure_of_turn(turn: Any, column: str) -> str:
    """How to convert a turn, in words behind a semicolon; empty where its form is not known."""
    # Other forms in use.
    if not isinstance(turn, dict):
        return ""
    content = turn.get("content")
    if "from" in turn and "value" in turn:
        roles = '{"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])'
        return "; this is the ShareGPT form: " + _of_each(
            f'{{"role": {roles}, "content": turn["value"]}}', column
        )
    if isinstance(content, list):
        text = (
            'turn["content"] if isinstance(turn["content"], str) else "".join(part["text"] for '
            'part in turn["content"])'
        )
        return "; these are OpenAI content parts: " + _of_each(
            f'{{"role": turn["role"], "content": {text}}}', column
        )

    # Turns without a text.
    if content is None and turn.get("tool_calls"):
        return (
            "; calls of tools are not read: write the call into 'content' as the model is to "
            "say it, or leave such rows out"
        )
    if content is None:
        return "; give it a text, or leave such rows out"
    return ""


def _of_each(turn: str, column: str) -> str:
    return _mapped(f'[{turn} for turn in row["{column}"]]')


def _mapped(messages: str) -> str:
    row = f'lambda row: {{"messages": {messages}}}'
    return (
        f"convert them once, with `datasets`: rows.map({row}, "
        'remove_columns=rows.column_names).to_json("chat.jsonl")'
    )


def _as_in_its_file(turn: Any) -> Any:
    """A turn without the fields that only other turns have: `datasets` adds them to it, as None."""
    if not isinstance(turn, dict):
        return turn
    return {name: value for name, value in turn.items() if value is not None or name == "content"}
