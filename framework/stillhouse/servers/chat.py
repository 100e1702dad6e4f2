"""What is asked of a server that writes, and what it says: chat completions, and completions of a
text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import ServerError
from stillhouse.servers.client import Question, Tokens

# A token has a byte at least. Beyond them a template adds some to each message.
_TOKENS_A_MESSAGE, _TOKENS_AROUND = 32, 256
_BYTES_A_TOKEN, _OTHER_BYTES = 64, 4 << 20  # of an answer at most, in JSON


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server wrote."""

    text: str  # empty where it gives none, such as a call of a tool alone
    finish: str  # "stop", "length", or another reason


def chat_question(
    messages: Sequence[Mapping[str, Any]], *, max_tokens: int, **fields: Any
) -> Question:
    """A reply to a conversation. `fields` may have `max_completion_tokens`, which then counts."""
    most = sum(_TOKENS_A_MESSAGE + _num_bytes(message) for message in messages)
    most += _num_bytes(fields)
    # the newer name, which servers that have it take alone
    newer = fields.get("max_completion_tokens")
    named = {"max_tokens": max_tokens} if newer is None else {}
    asked = {"messages": [*messages], **named} | fields
    most_written = max_tokens if newer is None else int(newer)
    return _question("chat/completions", asked, most_prompt=most, most_written=most_written)


def text_question(text: str, *, max_tokens: int, **fields: Any) -> Question:
    """What follows a text."""
    asked = {"prompt": text, "max_tokens": max_tokens} | fields
    return _question("completions", asked, most_prompt=_num_bytes(text), most_written=max_tokens)


def reply_of(body: Any) -> Reply:
    """The reply to either. Raises ServerError where there is none."""
    try:
        choice = body["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content")
        return Reply(text if isinstance(text, str) else "", str(choice.get("finish_reason")))
    except (LookupError, TypeError, AttributeError):
        raise ServerError(
            f"the server gives no completion, but {str(body)[:500]!r}; wanted one with the routes "
            "of OpenAI's API: check base_url"
        ) from None


def _question(
    route: str, fields: dict[str, Any], *, most_prompt: int, most_written: int
) -> Question:
    return Question(
        route,
        fields,
        Tokens(most_prompt + _TOKENS_AROUND, most_written),
        most_bytes=_OTHER_BYTES + _BYTES_A_TOKEN * most_written,
        wanted="a server that takes it: shorter, or with other settings",
    )


def _num_bytes(value: object) -> int:
    """The bytes of all texts in a value of JSON, names of fields included."""
    if isinstance(value, Mapping):
        return sum(_num_bytes(name) + _num_bytes(each) for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return sum(map(_num_bytes, value))
    return len(str(value).encode(errors="surrogatepass"))
