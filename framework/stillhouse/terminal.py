"""Text from outside on its way to a terminal: what would steer the terminal is shown and not
obeyed.

A store, a file's name, a chat template or a library's error may hold escape sequences that move the
cursor, hide text or turn it around.
"""

import re
import sys

# C0 and C1 but newline and tab, the marks and overrides of bidirectional text, other line ends,
# halves of a surrogate pair (which cannot be encoded: a file's name that is not UTF-8 has them)
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with every character that steers a terminal as its escape, such as \\x1b. Newlines
    and tabs stay."""
    return _STEERING.sub(_escape, text)


def one_line(text: str) -> str:
    """As `printable`, for a value that has one line: newlines and tabs are escaped, too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def say(text: str, *, error: bool = False) -> None:
    """Print a text, made printable, to standard output, or to standard error."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=error)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
