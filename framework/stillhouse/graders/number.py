"""The grader `number`: the last number of the text is that of the reference.

A number behind the last `####`, as in the answers of GSM8K (Cobbe et al. 2021, arXiv 2110.14168),
goes before a later one. Numbers are decimal: for fractions and expressions take `maths`.
"""

import re
from decimal import Decimal

from stillhouse.graders.base import Failure, Sample

# A minus behind a letter, a digit or a bracket is a hyphen or a subtraction. Commas are those of
# thousands, and an exponent has three digits at most.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])-)?"
    r"(?:(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?"
    r"|(?:(?<![\w.)\]}])-)?(?<!\d)\.\d+",
    re.ASCII,
)
_MARK = "####"
_LONGEST = 1000  # digits; a longer one is no answer


def score(sample: Sample) -> float:
    """See `NumberSection`."""
    wanted = None if sample.reference is None else last_number(sample.reference)
    if wanted is None:
        return Failure("no number in the reference", repr(sample.reference))
    return float(last_number(sample.text) == wanted)


def last_number(text: str) -> Decimal | None:
    """The number behind the last `####`, or else the last of the text; None where there is none."""
    text = text.replace("\u2212", "-")  # the minus of typesetting
    _, mark, after = text.rpartition(_MARK)
    behind = _NUMBER.search(after) if mark else None
    if behind is not None:
        return _value(behind[0])
    *_, last = [None, *_NUMBER.finditer(text)]
    return None if last is None else _value(last[0])


def _value(digits: str) -> Decimal | None:
    return Decimal(digits.replace(",", "")) if len(digits) <= _LONGEST else None
