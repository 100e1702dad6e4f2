"""The grader `maths`: text and reference are the same expression, by math-verify (the extra
'maths')."""

from collections.abc import Callable
from typing import Any

from stillhouse.graders.base import Failure, Sample


def scorer() -> Callable[[Sample], float]:
    """See `MathsSection`. For a grader's process: SymPy takes seconds to import, and 100 MB.

    math-verify's own time limits are off, since the process has one.
    """
    import math_verify

    def parsed(text: str) -> Any:
        return math_verify.parse(text, parsing_timeout=None)

    def score(sample: Sample) -> float:
        if sample.reference is None:
            return Failure("no reference")
        # LaTeX without the marks of mathematics around it is a reference, too
        wanted = parsed(f"${sample.reference}$") or parsed(sample.reference)
        if not wanted:
            return Failure("no expression in the reference", repr(sample.reference))
        is_right = math_verify.verify(wanted, parsed(sample.text), timeout_seconds=None)
        return float(bool(is_right))

    return score
