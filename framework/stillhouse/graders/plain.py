"""A grader that is one function of a sample, in the process that asks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stillhouse.config.graders import GraderSection
from stillhouse.graders.base import Sample
from stillhouse.graders.identity import identity_of


class Plain:
    """For functions that can neither hang nor take much memory."""

    def __init__(self, section: GraderSection, score: Callable[[Sample], float]) -> None:
        self._section, self._score = section, score

    @property
    def identity(self) -> Mapping[str, Any]:
        return identity_of(self._section)

    def grade(self, samples: Sequence[Sample]) -> list[float]:
        return [self._score(sample) for sample in samples]

    def close(self) -> None:
        """It has started nothing."""
