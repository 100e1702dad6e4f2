"""Log-probabilities that a server returns with its text: of each token that it sampled, and of the
likeliest ones in its place.

A chat completion has them under `content`, each as a text and, where the server can, its bytes:

    {"content": [{"token": "Hi", "bytes": [72, 105], "logprob": -0.1, "top_logprobs": [...]}]}

A completion has texts alone: {"tokens": [...], "token_logprobs": [...], "top_logprobs": [{...}]}.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_MOST = 1e30  # which float32 has, too


class Entry(NamedTuple):
    """A token as a server names it."""

    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token that was sampled, and the likeliest ones in its place."""

    sampled: Entry
    top: tuple[Entry, ...]


def logprobs_of(logprobs: Any) -> tuple[TokenLogprobs, ...] | None:
    """What the `logprobs` of a choice say; None where they say nothing, or no finite numbers."""
    try:
        if "tokens" in logprobs:
            return _of_completion(logprobs)
        return tuple(
            TokenLogprobs(_entry(each), tuple(map(_entry, each["top_logprobs"])))
            for each in logprobs["content"]
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def logprobs_in_json(tokens: tuple[TokenLogprobs, ...]) -> list[list[list[Any]]]:
    """For each token a list of pairs: the sampled one, then the likeliest; bytes as hexadecimal
    digits."""
    return [
        [[token.hex(), logprob] for token, logprob in (each.sampled, *each.top)] for each in tokens
    ]


def logprobs_in(values: Any) -> tuple[TokenLogprobs, ...] | None:
    """What `logprobs_in_json` wrote; None where it is something else."""
    try:
        found = [
            [Entry(bytes.fromhex(token), _finite(logprob)) for token, logprob in entries]
            for entries in values
        ]
        return tuple(TokenLogprobs(entries[0], tuple(entries[1:])) for entries in found)
    except (LookupError, TypeError, ValueError):
        return None


def _of_completion(logprobs: Mapping[str, Any]) -> tuple[TokenLogprobs, ...]:
    columns = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
    return tuple(
        TokenLogprobs(
            Entry(token.encode(), _finite(logprob)),
            tuple(Entry(name.encode(), _finite(each)) for name, each in top.items()),
        )
        for token, logprob, top in zip(*columns, strict=True)
    )


def _entry(values: Mapping[str, Any]) -> Entry:
    given = values.get("bytes")
    token = values["token"].encode() if given is None else bytes([*given])
    return Entry(token, _finite(values["logprob"]))


def _finite(logprob: Any) -> float:
    number = float(logprob)
    if not abs(number) <= _MOST:
        raise ValueError(f"{number} is no log-probability")
    return number
