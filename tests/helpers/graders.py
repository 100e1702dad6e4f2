"""Sections of graders, and graders of a user's own, which do whatever the text says."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from stillhouse.config.graders import GraderSection
from stillhouse.graders import Sample

_SECTIONS: TypeAdapter[GraderSection] = TypeAdapter(GraderSection)


def section(**values: Any) -> GraderSection:
    return _SECTIONS.validate_python(values)


def samples(texts: Sequence[str], reference: str | None = "") -> list[Sample]:
    return [Sample("a question", text, reference) for text in texts]


def obedient(sample: Sample) -> float:
    """A user's grader. The text is a score, or what to do instead of giving one."""
    match sample.text.split():
        case ["raise"]:
            raise LookupError("as the text says")
        case ["hang"]:
            time.sleep(3600)
        case ["leave"]:
            os._exit(0)
        case ["eat"]:
            return float(len(bytearray(256 << 20)))
        case ["print"]:
            print("{}\n" * 100_000)
            return 1.0
    return float(sample.text)


def deadly(sample: Sample) -> float:
    """A user's grader, which kills the command once: where the reference names a file that is not
    there yet."""
    mark = Path(sample.reference or "/")
    if not mark.exists():
        mark.touch()
        os.kill(os.getppid(), signal.SIGKILL)
    return 1.0


not_a_function = 3
