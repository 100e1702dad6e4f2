"""samples.json of a run directory: what a model wrote of the text that a run trains on, what of it
is kept, and a few samples to look at. The report is made of it, so it needs no store.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from stillhouse.redaction import scrub
from stillhouse.sealed import opened, sealed

FILE_NAME = "samples.json"


@dataclass(frozen=True, slots=True)
class Grading:
    """The scores that one grader gave to samples."""

    num_samples: int
    mean_score: float
    num_full: int  # samples of score 1
    by_tenth: tuple[int, ...]  # samples by score: 0 to 0.1, ..., 0.9 to 1


@dataclass(frozen=True, slots=True)
class ShownSample:
    """A sample to look at. Long texts are cut in their middle."""

    prompt_number: int
    sample_number: int
    prompt: str
    text: str
    finish: str  # "ended", "cut" or "set aside"
    scores: Mapping[str, float]  # by the name of a grader
    reason: str | None  # why it is dropped; None: it is kept


@dataclass(frozen=True, slots=True)
class SampleAccount:
    """What was read of the rollouts of one recipe."""

    num_prompts: int
    num_ended: int
    num_cut: int
    num_set_aside: int
    num_tokens: int  # that were sampled
    num_kept: int
    drops: Mapping[str, int]  # samples by the reason why they are dropped
    gradings: Mapping[str, Grading]  # by the name of a grader
    kept: Sequence[ShownSample]
    dropped: Sequence[ShownSample]

    @property
    def num_samples(self) -> int:
        return self.num_ended + self.num_cut + self.num_set_aside

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `asdict` made of one. Raises TypeError, KeyError or AttributeError for anything
        else."""
        gradings = {
            name: Grading(**{**each, "by_tenth": tuple(each["by_tenth"])})
            for name, each in values["gradings"].items()
        }
        shown = {
            name: [ShownSample(**each) for each in values[name]] for name in ("kept", "dropped")
        }
        return cls(**{**values, "gradings": gradings, **shown})


def samples_file(accounts: Mapping[str, SampleAccount]) -> bytes:
    """The bytes of samples.json: accounts by the name of their data set, without secrets."""
    data_sets = [{"name": name, "samples": asdict(each)} for name, each in accounts.items()]
    return (json.dumps(sealed({"data_sets": scrub(data_sets)}), indent=2) + "\n").encode()


def read_samples(run_dir: Path) -> dict[str, SampleAccount]:
    """The accounts of a run directory; none where the file is absent or damaged."""
    try:
        values = opened(json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8")))
        return {
            each["name"]: SampleAccount.from_json(each["samples"]) for each in values["data_sets"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
