"""Names of small objects in a store, of consumers and of labels: what is one, and how one is made
of any text."""

import re

_MOST_OF_A_TEXT = 64  # characters; a name has room for a digest behind it
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def is_name(text: str) -> bool:
    """Whether a text is up to 128 letters, digits, dots, hyphens and underscores, without a dot at
    its beginning."""
    return _NAME.fullmatch(text) is not None


def name_like(text: str) -> str:
    """The beginning of a name that resembles a text; `run` where nothing is left of it."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip(".")
    return plain[:_MOST_OF_A_TEXT] or "run"
