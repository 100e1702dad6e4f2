"""A sample, a grader, and `graded`: scores of samples, whatever a grader does.

A grader that raises, hangs or takes too much memory costs a sample its score, never the run. One
that fails on every sample is broken, and its scores are not recorded.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from stillhouse.errors import GraderError, StillhouseError

_SHOWN_CHARACTERS = 200


class Sample(NamedTuple):
    """What is graded. `reference` is what the data set has beside the prompt: an answer, or a
    test."""

    prompt: str
    text: str
    reference: str | None


class Grader(Protocol):
    """Gives each sample a score from 0 to 1; starts what it needs at its first use."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the scores, as JSON values: verdicts are named by its digest."""
        ...

    def grade(self, samples: Sequence[Sample]) -> list[float]:
        """A score for each sample, in order. A `Failure` among them counts as 0."""
        ...

    def close(self) -> None:
        """End what it has started."""
        ...


class Failure(float):
    """The score 0 of a sample that could not be graded, with the reason.

    `is_graders`: the fault may be the grader's. Code that runs for ever is at fault itself.
    """

    def __new__(cls, reason: str, detail: str = "", *, is_graders: bool = True) -> "Failure":
        del reason, detail, is_graders  # of __init__
        return super().__new__(cls, 0.0)

    def __init__(self, reason: str, detail: str = "", *, is_graders: bool = True) -> None:
        self.reason, self.detail, self.is_graders = reason, detail, is_graders


@dataclass(frozen=True, slots=True)
class Graded:
    """Scores of samples, in order, and how many could not be graded, by reason."""

    scores: tuple[float, ...]
    failures: Mapping[str, int]  # the most frequent first


def graded(grader: Grader, samples: Sequence[Sample]) -> Graded:
    """The scores of a shard's samples.

    Raises GraderError where the grader failed on every one of them. A UserError or RunError of the
    grader is raised as it is: it is about the grader, not about a sample.
    """
    scores = _scores_of(grader, samples)
    failures = [score for score in scores if isinstance(score, Failure)]
    if samples and len(failures) == len(samples) and all(each.is_graders for each in failures):
        kind, first = grader.identity["kind"], failures[0]
        raise GraderError(
            f"the grader {kind} failed on all {len(samples)} samples: {_in_words(failures)}"
            f"{f' (the first: {first.detail[:_SHOWN_CHARACTERS]})' if first.detail else ''}; a "
            "score was wanted for one of them at least: mend the grader, its limits or the "
            "references, and run again"
        )
    return Graded(tuple(map(float, scores)), _counted(failures))


def _scores_of(grader: Grader, samples: Sequence[Sample]) -> list[float]:
    """All at once; where that raises, one after the other, so that it costs one sample alone."""
    try:
        scores = grader.grade(samples)
        if len(scores) == len(samples):
            return [*map(_checked, scores)]
    except StillhouseError:
        raise
    except Exception as error:
        if len(samples) == 1:
            return [failure_of(error)]
    else:
        if len(samples) == 1:
            return [Failure("not one score", f"{len(scores)} scores for one sample")]
    return [score for sample in samples for score in _scores_of(grader, [sample])]


def failure_of(error: BaseException) -> Failure:
    """That of a sample at which a grader raised this."""
    reason = "memory" if isinstance(error, MemoryError) else type(error).__name__
    return Failure(reason, str(error))


def _checked(score: object) -> float:
    is_number = isinstance(score, int | float)
    if is_number and 0.0 <= score <= 1.0:  # type: ignore[operator]
        return score if isinstance(score, Failure) else float(score)  # type: ignore[arg-type]
    return Failure("no score from 0 to 1", repr(score))


def _counted(failures: Sequence[Failure]) -> dict[str, int]:
    """By frequency, then by name: the same for the same samples in any order."""
    counts = Counter(failure.reason for failure in failures)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _in_words(failures: Sequence[Failure]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in _counted(failures).items())
