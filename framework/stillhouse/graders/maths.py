"""The grader `maths`: text and reference are the same expression, by math-verify (the extra
'maths'). Only a grader's process imports this: SymPy takes seconds and 100 MB."""

from typing import Any

import math_verify

from stillhouse.graders.base import Failure, Sample


def score(sample: Sample) -> float:
    """See `MathsSection`. math-verify's own time limits are off: the process has one."""
    wanted = [] if sample.reference is None else _parsed(sample.reference)
    if not wanted:
        return Failure("no expression in the reference", repr(sample.reference))
    found = math_verify.parse(sample.text, parsing_timeout=None)
    return float(bool(math_verify.verify(wanted, found, timeout_seconds=None)))


def _parsed(reference: str) -> list[Any]:
    """LaTeX without the marks of mathematics around it is a reference, too."""
    found: list[Any] = math_verify.parse(f"${reference}$", parsing_timeout=None)
    return found or math_verify.parse(reference, parsing_timeout=None)
