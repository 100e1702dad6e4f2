"""Fenced blocks in what a model writes."""

import re

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def last_block(text: str) -> str:
    """What is in the last block between lines of ```, or the whole text where there is none."""
    *_, last = [text, *(match[1] for match in _FENCE.finditer(text))]
    return last
