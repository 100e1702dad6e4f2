"""Graders of what a model writes, a table [[graders]] each, and which samples are accepted: the
sections [corpus.accept] and [corpus.decontaminate]."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from stillhouse import suggestions
from stillhouse.config.fields import (
    Count,
    Fraction,
    Name,
    NumBytes,
    NumProcesses,
    Seconds,
    Section,
    shown,
)
from stillhouse.config.servers import ChatSection, MostCost
from stillhouse.extension import is_extension


class _GraderSection(Section):
    """What every grader has. A kind is a setting of each, because it chooses the others."""

    kind: str
    name: Name | None = Field(
        None, description="what accept.min_score calls this grader; none: its kind"
    )

    @property
    def title(self) -> str:
        return self.name or self.kind

    @property
    def compares(self) -> bool:
        """Whether it needs the reference of each prompt."""
        return self.kind in ("exact", "number", "maths", "python")


class ChildSection(_GraderSection):
    """What a grader in processes of its own has."""

    wall_s: Seconds = Field(10.0, description="seconds that one sample may take")
    memory_bytes: NumBytes = Field(4 << 30, description="address space of one process")
    num_processes: NumProcesses = Field(1, description="samples that are graded at one time")


class ExactSection(_GraderSection):
    """1 where the text is the reference."""

    kind: Literal["exact"]
    normalise: Literal["none", "spaces", "words"] = Field(
        "spaces",
        description="before they are compared: none: nothing; spaces: white space becomes one "
        "space; words: also lower case, without punctuation and the articles a, an and the",
    )
    after: Name | None = Field(
        None,
        description="compare only what follows the last of these marks, such as '####' or "
        "'</think>'; a text without one is compared whole",
    )


class NumberSection(_GraderSection):
    """1 where the last number of the text is that of the reference."""

    kind: Literal["number"]


class MathsSection(ChildSection):
    """1 where math-verify finds text and reference to be the same expression; needs the extra
    'maths'."""

    kind: Literal["maths"]


class JsonSchemaSection(ChildSection):
    """1 where the text is JSON that the schema allows."""

    kind: Literal["json_schema"]
    schema_text: Name = Field(description="the JSON Schema, as JSON text")

    @field_validator("schema_text")
    @classmethod
    def _is_an_object(cls, text: str) -> str:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"wanted a JSON Schema as JSON text; found {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"wanted a JSON object; found {shown(found)}")
        return text


class PythonSection(_GraderSection):
    """1 where the reference, a test, runs to its end behind the text's code, in a sandbox."""

    kind: Literal["python"]
    interpreter: Name | None = Field(
        None,
        description="the Python that runs it, which every user must be able to read; none: that of "
        "Stillhouse; the standard library alone can be imported",
    )
    wall_s: Seconds = Field(10.0, description="seconds that one test may take")
    memory_bytes: NumBytes = Field(512 << 20, description="memory of one test")
    file_bytes: NumBytes = Field(16 << 20, description="bytes that one test may write into files")
    output_bytes: NumBytes = Field(1 << 20, description="bytes that one test may print")
    max_tasks: Annotated[int, Field(ge=1, le=1024)] = Field(
        16, description="processes and threads that one test may have at one time"
    )
    num_processes: NumProcesses = Field(1, description="tests that run at one time")


class JudgeSection(_GraderSection, ChatSection):
    """A score that a model gives, at any server with OpenAI's chat API."""

    kind: Literal["judge"]
    served_model: Name = Field(description="the judge's name at the server")
    max_in_flight: Annotated[int, Field(ge=1, le=4096)] = Field(
        8, description="requests that are under way at one time"
    )
    max_cost_usd: MostCost | None = Field(
        None, description="what all verdicts of this grader may cost; none: no limit"
    )
    template: Name = Field(
        description="what the judge is asked; {prompt}, {text} and {reference} stand for those of "
        "the sample"
    )
    score_pattern: Name = Field(
        r"(?i)score\D{0,10}(\d+(?:\.\d+)?)",
        description="a regular expression whose group is the score in the judge's answer; its last "
        "match counts",
    )
    best_score: Annotated[float, Field(gt=0.0, le=1e9)] = Field(
        10.0, description="the score that becomes 1; 0 becomes 0"
    )
    max_tokens: Count = Field(1024, description="tokens of an answer at most")
    patience_s: Seconds = Field(
        600.0, description="seconds for which a server that does not answer is asked again"
    )

    @property
    def compares(self) -> bool:
        return "{reference}" in self.template

    @field_validator("template")
    @classmethod
    def _shows_the_text(cls, template: str) -> str:
        if "{text}" not in template:
            raise ValueError("wanted {text} somewhere, or the judge would not see what it judges")
        return template


class OwnSection(ChildSection):
    """A function of the user's own: it takes a Sample and returns a score from 0 to 1."""

    kind: str

    @field_validator("kind")
    @classmethod
    def _is_an_extension(cls, name: str) -> str:
        if is_extension(name):
            return name
        raise ValueError(
            f"wanted {', '.join(SECTIONS_BY_KIND)}, or 'package.module:name' of your own; found "
            f"{shown(name)}{suggestions.value(name, [*SECTIONS_BY_KIND])}"
        )


SECTIONS_BY_KIND: Mapping[str, type[_GraderSection]] = {
    "exact": ExactSection,
    "number": NumberSection,
    "maths": MathsSection,
    "json_schema": JsonSchemaSection,
    "python": PythonSection,
    "judge": JudgeSection,
}
_OWN = "own"


def _kind_of(value: object) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) and kind in SECTIONS_BY_KIND else _OWN


GraderSection = Annotated[
    Annotated[ExactSection, Tag("exact")]
    | Annotated[NumberSection, Tag("number")]
    | Annotated[MathsSection, Tag("maths")]
    | Annotated[JsonSchemaSection, Tag("json_schema")]
    | Annotated[PythonSection, Tag("python")]
    | Annotated[JudgeSection, Tag("judge")]
    | Annotated[OwnSection, Tag(_OWN)],
    Discriminator(_kind_of),
]


class AcceptSection(Section):
    """Which samples of a model are trained on. A view: it can be changed without writing or grading
    anything again."""

    min_score: dict[Name, Fraction] = Field(
        {}, description="the least score by each of these graders, such as {maths = 1.0}"
    )
    keep_unfinished: bool = Field(
        False, description="also accept samples that were cut at the longest length"
    )
    with_logprobs: bool = Field(
        False,
        description="only samples with log-probabilities from the writer's API, from which "
        'teacher.engine = "rollouts" learns',
    )
    best_of: Count | None = Field(
        None,
        description="of each prompt's first so many samples, the best by the mean score of the "
        "graders in min_score; none: all samples, in their order",
    )
    most_a_prompt: Count | None = Field(
        None, description="samples of a prompt to keep at most; none: 1 with best_of, else all"
    )
    keep_repeats: bool = Field(False, description="keep sequences that repeat another's tokens")
    similarity: Annotated[float, Field(ge=0.5, lt=1.0)] | None = Field(
        None,
        description="drop sequences that share this part of their runs of five tokens with one "
        "that is kept, such as 0.8; none: only exact repeats",
    )

    @model_validator(mode="after")
    def _the_best_can_be_told(self) -> "AcceptSection":
        if self.best_of is not None and not self.min_score:
            raise ValueError(
                f"best_of is {self.best_of}, but min_score names no grader to choose by; name one, "
                "with 0.0 to require nothing of it"
            )
        return self

    @property
    def kept_a_prompt(self) -> int | None:
        """The samples of a prompt to keep at most."""
        return 1 if self.most_a_prompt is None and self.best_of is not None else self.most_a_prompt


class TestSetSection(Section):
    """A test set: every text in every row of a data set."""

    __test__ = False  # it is none of pytest's

    dataset: Name = Field(
        description="a hub data set; or local text, json(l), csv, parquet or arrow files, a glob "
        "or a directory"
    )
    subset: str | None = Field(None, description="the hub data set's configuration name")
    split: str = Field("test", description="the hub data set's split; of local files all is read")
    revision: str | None = Field(None, description="a branch, tag or commit of a hub data set")


class DecontaminateSection(Section):
    """Test sets of which samples must not hold passages."""

    test_sets: dict[Name, TestSetSection] = Field(
        {},
        description="data sets by a name for each, such as gsm8k = {dataset = 'openai/gsm8k', "
        "subset = 'main'}",
    )
    max_share: Fraction = Field(
        0.1,
        description="share of a sample's runs of 13 words that may be in a test set before the "
        "sample is dropped",
    )
    passage_words: Annotated[int, Field(ge=13, le=10**6)] = Field(
        50, description="words in a row of a test set for which a sample of any length is dropped"
    )


def require_names_of_their_own(graders: Sequence[_GraderSection]) -> None:
    """Raises ValueError where two graders have one name."""
    counts = Counter(grader.title for grader in graders)
    twice = [title for title, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"two graders are called {shown(twice[0])}; give each of them a name of its own"
        )


def require_no_references(graders: Sequence[_GraderSection]) -> None:
    """Raises ValueError where a grader compares with references: there are none."""
    for grader in graders:
        if grader.compares:
            raise ValueError(
                f"the grader {shown(grader.title)} compares with references, but "
                "prompts.reference_column is not set; name the column of right answers, or of tests"
            )


def require_known(accept: AcceptSection, titles: Sequence[str]) -> None:
    """Raises ValueError where [accept] names a grader that is none of these."""
    for name in accept.min_score:
        if name not in titles:
            raise ValueError(
                f"accept.min_score names the grader {shown(name)}, which is none of "
                f"{', '.join(titles) or 'the graders: there are none'}"
                f"{suggestions.value(name, titles)}"
            )
