"""The grader `python`: the reference, a test, runs to its end behind the text's code, in a sandbox.

The code is the last fenced block of the text, or all of it where there is none. Code and test share
a namespace, whose `__name__` is "solution".
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stillhouse.config.graders import PythonSection
from stillhouse.graders.base import Failure, Sample
from stillhouse.graders.fences import last_block
from stillhouse.graders.identity import identity_of
from stillhouse.graders.sandbox import Bounds, Sandbox

_CUT_OFF = {"time", "output", "ended"}


class Python:
    """See `PythonSection`. The first samples raise ConfigError where no sandbox can be had."""

    def __init__(self, section: PythonSection) -> None:
        self._section = section
        self._sandbox: Sandbox | None = None
        self._first = threading.Lock()
        self._threads = ThreadPoolExecutor(section.num_processes, thread_name_prefix="sandbox")

    @property
    def identity(self) -> Mapping[str, Any]:
        return identity_of(self._section)

    def grade(self, samples: Sequence[Sample]) -> list[float]:
        with self._first:
            if self._sandbox is None:
                self._sandbox = sandbox_of(self._section)
        sandbox = self._sandbox
        return list(self._threads.map(lambda sample: _score(sandbox, sample), samples))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


def sandbox_of(section: PythonSection) -> Sandbox:
    """The sandbox of a section, tried. Raises ConfigError where it cannot be had."""
    names = Bounds.__dataclass_fields__
    bounds = Bounds(**{name: getattr(section, name) for name in names})
    return Sandbox(bounds, interpreter=section.interpreter)


def _score(sandbox: Sandbox, sample: Sample) -> float:
    """Code that takes too much is at fault itself; it is counted all the same."""
    if sample.reference is None:
        return Failure("no test")
    ending = sandbox.run([last_block(sample.text), sample.reference]).ending
    if ending.startswith("MemoryError"):
        return Failure("memory", is_graders=False)
    if ending in _CUT_OFF:
        return Failure(ending, is_graders=False)
    return float(ending == "passed")
