"""What is asked of a server that writes, and what it says: chat completions, and completions of a
text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import ServerError
from stillhouse.servers.client import Question, Tokens
from stillhouse.servers.logprobs import TokenLogprobs, logprobs_of

# A token has a byte at least. Beyond them a template adds some to each message.
_TOKENS_A_MESSAGE, _TOKENS_AROUND = 32, 256
# of an answer at most, in JSON
_BYTES_A_TOKEN, _BYTES_AN_ENTRY, _OTHER_BYTES = 64, 1024, 4 << 20


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server wrote."""

    text: str  # empty where it gives none, such as a call of a tool alone
    finish: str  # "stop", "length", or another reason
    logprobs: tuple[TokenLogprobs, ...] | None = None  # of each token; None where there are none


def chat_question(
    messages: Sequence[Mapping[str, Any]], *, max_tokens: int, num_entries: int = 0, **fields: Any
) -> Question:
    """A reply to a conversation. `fields` may have `max_completion_tokens`, which then counts.
    `num_entries`: log-probabilities to ask for with each token."""
    if num_entries:
        fields = {"logprobs": True, "top_logprobs": num_entries} | fields
    most = sum(_TOKENS_A_MESSAGE + _num_bytes(message) for message in messages)
    most += _num_bytes(fields)
    # the newer name, which servers that have it take alone
    newer = fields.get("max_completion_tokens")
    named = {"max_tokens": max_tokens} if newer is None else {}
    asked = {"messages": [*messages], **named} | fields
    tokens = Tokens(most, max_tokens if newer is None else int(newer))
    return _question("chat/completions", asked, tokens, num_entries=num_entries)


def text_question(text: str, *, max_tokens: int, num_entries: int = 0, **fields: Any) -> Question:
    """What follows a text. `num_entries`: log-probabilities to ask for with each token."""
    if num_entries:
        fields = {"logprobs": num_entries} | fields
    asked = {"prompt": text, "max_tokens": max_tokens} | fields
    tokens = Tokens(_num_bytes(text), max_tokens)
    return _question("completions", asked, tokens, num_entries=num_entries)


def reply_of(body: Any) -> Reply:
    """The reply to either. Raises ServerError where there is none."""
    try:
        choice = body["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content")
        return Reply(
            text if isinstance(text, str) else "",
            str(choice.get("finish_reason")),
            logprobs_of(choice.get("logprobs")),
        )
    except (LookupError, TypeError, AttributeError):
        raise ServerError(
            f"the server gives no completion, but {str(body)[:500]!r}; wanted one with the routes "
            "of OpenAI's API: check base_url"
        ) from None


def _question(route: str, fields: dict[str, Any], tokens: Tokens, *, num_entries: int) -> Question:
    """`tokens`: at most, but for those around a prompt."""
    num_bytes = _BYTES_A_TOKEN + (_BYTES_AN_ENTRY * (num_entries + 1) if num_entries else 0)
    return Question(
        route,
        fields,
        Tokens(tokens.prompt + _TOKENS_AROUND, tokens.written),
        most_bytes=_OTHER_BYTES + num_bytes * tokens.written,
        wanted="a server that takes it: shorter, or with other settings",
    )


def _num_bytes(value: object) -> int:
    """The bytes of all texts in a value of JSON, names of fields included."""
    if isinstance(value, Mapping):
        return sum(_num_bytes(name) + _num_bytes(each) for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return sum(map(_num_bytes, value))
    return len(str(value).encode(errors="surrogatepass"))
