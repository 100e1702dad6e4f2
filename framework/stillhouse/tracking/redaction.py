"""Secrets are taken out of whatever is written down: the journal, W&B, the report."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET_WORDS = frozenset(["token", "key", "apikey", "secret", "password", "passwd", "credential", "credentials"])
_SECRET_TEXT = re.compile(
    r"""(?ix) (?P<user>://)[^/\s@]+(?=@)                                                      # user:password@host
    | (?P<name>(?:(?<!per_)token|key|secret|password|credential|sig|signature)\s*=\s*)(?:"[^"]*"|'[^']*'|[^\s&"']+)
    | (?P<bearer>\bBearer\s+)\S+
    | \b(?:hf_|gh[pousr]_|github_pat_|sk-|AKIA|ASIA|wandb_v\d_)[A-Za-z0-9_-]{12,}             # what services hand out"""
)
REDACTED = "(redacted)"


def scrub(values: Any, *, secret: bool = False) -> Any:
    """The same plain values with every secret text replaced: by the name it lies under (api_key, hf_token), or by its own look."""
    if isinstance(values, Mapping):
        return {name: scrub(value, secret=secret or _names_a_secret(str(name))) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(scrub(value, secret=secret) for value in values)
    if not isinstance(values, str):
        return values
    if secret:
        return REDACTED
    return _SECRET_TEXT.sub(lambda found: (found["user"] or found["name"] or found["bearer"] or "") + REDACTED, values)


def _names_a_secret(name: str) -> bool:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower()
    return not _SECRET_WORDS.isdisjoint(re.split(r"[^a-z0-9]+", words))
