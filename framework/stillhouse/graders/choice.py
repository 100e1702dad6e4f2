"""The grader of a section [[graders]]."""

import importlib.util
from functools import partial
from typing import TYPE_CHECKING, assert_never

from stillhouse.config.graders import (
    ExactSection,
    GraderSection,
    JsonSchemaSection,
    JudgeSection,
    MathsSection,
    NumberSection,
    OwnSection,
    PythonSection,
)
from stillhouse.errors import ConfigError
from stillhouse.extension import load_extension
from stillhouse.graders import exact, number
from stillhouse.graders.base import Grader
from stillhouse.graders.plain import Plain
from stillhouse.graders.processes import InProcesses, Scorer

if TYPE_CHECKING:  # a grader's child imports this room, and has little memory
    from stillhouse.servers.client import Access


def make_grader(section: GraderSection, *, access: "Access | None" = None) -> Grader:
    """The grader of a section; `access` is a judge's, to its server.

    Raises ConfigError where a part of it is not installed, or is not there.
    """
    match section:
        # in this process
        case ExactSection():
            score = partial(exact.score, normalise=section.normalise, after=section.after)
            return Plain(section, score)
        case NumberSection():
            return Plain(section, number.score)
        # in processes, a sandbox, or at a server
        case MathsSection():
            _require_math_verify()
            return InProcesses(section, Scorer("stillhouse.graders.maths", "scorer", {}))
        case JsonSchemaSection():
            from stillhouse.graders import json_schema

            json_schema.scorer(section.schema_text)
            settings = {"schema_text": section.schema_text}
            return InProcesses(section, Scorer(json_schema.__name__, "scorer", settings))
        case PythonSection():
            from stillhouse.graders.python import Python

            return Python(section)
        case JudgeSection():
            from stillhouse.graders.judge import Judge
            from stillhouse.servers.client import Access

            return Judge(section, Access() if access is None else access)
        case OwnSection():
            _require_function(section.kind)
            module, _, name = section.kind.partition(":")
            return InProcesses(section, Scorer(module, name, None))
        case _:
            assert_never(section)


def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "a grader is of the kind 'maths', but math-verify is not installed; run `pip install "
            "'stillhouse[maths]'` on every machine"
        )


def _require_function(name: str) -> None:
    if not callable(load_extension(name, setting="graders.kind")):
        raise ConfigError(
            f'graders.kind is "{name}", which is no function; name one that takes a Sample and '
            "returns a score from 0 to 1"
        )
