"""Printing text from outside on a terminal: control sequences are shown as text, not carried out.

A store, a file's name, a chat template or a library's error may hold escape sequences that move the
cursor, hide text or reverse it.
"""

import re
import sys

# The control characters C0 and C1 without newline and tab, the marks and overrides of bidirectional
# text, other line ends, and halves of surrogate pairs, which cannot be encoded: the name of a file
# that is not UTF-8 has them.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with every control character as an escape, such as \\x1b. Newlines and tabs stay."""
    return _STEERING.sub(_escape, text)


def one_line(text: str) -> str:
    """As `printable`, for a value on one line: newlines and tabs are escaped, too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def say(text: str, *, error: bool = False) -> None:
    """Print a text, made printable, to standard output, or to standard error."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=error)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
