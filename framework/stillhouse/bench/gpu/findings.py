"""What the parts of a GPU session find: a line of JSON each, once it is known, and a table."""

import json
import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

_SHOWN_CHARACTERS = 200  # of an error, in the table

Value = bool | float | str


@dataclass(frozen=True, slots=True)
class Finding:
    """One measurement or check: a bool is whether something is right; a float may have bounds."""

    part: str
    name: str
    value: Value
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    details: dict[str, object] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """None where nothing was promised."""
        if isinstance(self.value, bool):
            return self.value
        least = -math.inf if self.at_least is None else self.at_least
        most = math.inf if self.at_most is None else self.at_most
        if (least, most) == (-math.inf, math.inf):
            return None
        return isinstance(self.value, float) and least <= self.value <= most  # not NaN


@dataclass(frozen=True, slots=True)
class Recorder:
    """Appends the findings of one part to a file that the parts share, one after the other."""

    path: Path
    part: str

    def tell(
        self,
        name: str,
        value: Value,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        **details: object,
    ) -> None:
        found = Finding(self.part, name, value, unit, at_least, at_most, details)
        line = json.dumps(asdict(found) | {"passed": found.passed}, default=str) + "\n"
        # unbuffered, so that a line is one write, and no kill leaves a part of one
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
        print(line_of(found), flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """An exception within is a failed finding; the part goes on after the block."""
        try:
            yield
        except Exception as failure:  # whatever a compiler, driver or library raises
            words = f"{type(failure).__name__}: {failure}"
            self.tell(name, False, error=words[:500], traceback=traceback.format_exc()[-2000:])


def read_findings(path: Path) -> list[Finding]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Finding(**{name: row[name] for name in row if name != "passed"}) for row in rows]


def table(findings: Sequence[Finding]) -> str:
    """A line for each finding, part by part, and how many of the promises were kept."""
    verdicts = [found.passed for found in findings]
    passed, failed, others = (verdicts.count(verdict) for verdict in (True, False, None))
    counted = f"{passed} passed, {failed} FAILED, {others} without a promise"
    return "\n".join([*map(line_of, findings), counted])


def line_of(found: Finding) -> str:
    verdict = {True: "passed", False: "FAILED", None: ""}[found.passed]
    bounds = [("at least", found.at_least), ("at most", found.at_most)]
    wanted = " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)
    match found.value:
        case bool():
            shown = ""
        case float():
            shown = f"{found.value:.4g}"
        case _:
            shown = str(found.value)
    value = f"{shown} {found.unit}".strip()
    columns = f"{found.part:12}{found.name:60} {value:20} {wanted:14}"
    error = " ".join(str(found.details.get("error", "")).split())
    return f"{columns} {verdict} {error[:_SHOWN_CHARACTERS]}".rstrip()
