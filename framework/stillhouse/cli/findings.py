"""What `stillhouse check` collects, and how it writes numbers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from stillhouse.cluster.machine import why_not_writable
from stillhouse.errors import StoreError
from stillhouse.redaction import scrub
from stillhouse.student.memory import StudentSize
from stillhouse.terminal import one_line, printable


class Piece(NamedTuple):
    """A part of an example's text, and whether it is learnt."""

    text: str
    is_learnt: bool


@dataclass(slots=True)
class Findings:
    """Rows of a label and a text, notes that are worth knowing, obstacles, which would stop the
    run, and an example of the corpus."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    num_parameters: dict[str, int] = field(default_factory=dict)  # by role
    teacher_bytes: float | None = None  # of its weights; None: its model cannot be used
    student_size: StudentSize | None = None  # None: its model cannot be used
    example: list[Piece] = field(default_factory=list)  # of the corpus

    def add(self, label: str, *texts: str) -> None:
        """A row, and rows without a label below it."""
        self.rows += zip((label, *[""] * len(texts)), texts, strict=False)


def print_findings(found: Findings) -> None:
    """Print rows and notes. Obstacles are the message of the error that the caller raises."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in found.rows:
        table.add_row(label, Text(one_line(scrub(text))))
    console = Console(highlight=False)
    console.print(table)
    if found.example:
        console.print(_example(found.example, in_colour=console.color_system is not None))
    for note in found.notes:
        console.print(Text(printable(scrub(f"note: {note}"))))
    if not found.obstacles:
        console.print("\nNothing stands in the way of this run.", style="green")


def _example(pieces: Sequence[Piece], *, in_colour: bool) -> Text:
    """The text, with what is learnt in colour or between marks."""
    begin, end, style = ("", "", "green") if in_colour else ("«", "»", "")
    how = "in green" if in_colour else "between « and »"
    text = Text.assemble("\n", (f"example; what is {how} is learnt", "bold"), "\n")
    for piece in pieces:
        shown = printable(scrub(piece.text))
        text.append(f"{begin}{shown}{end}" if piece.is_learnt else shown, style * piece.is_learnt)
    return text.append("\n")


def require_writable(path: Path) -> None:
    """Raise StoreError where the directory cannot be written, or could not be made."""
    why = why_not_writable(path)
    if why is not None:
        raise StoreError(f"{why}; name another place")


def bullets(lines: Collection[str], indent: str = "  - ") -> str:
    return "\n".join(f"{indent}{line}" for line in lines)


def count_words(number: float) -> str:
    """A number of things, to three digits: 950, 25.3 M, 32.8 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def size_words(num_bytes: float) -> str:
    """A number of bytes: 1.5 GB."""
    return decimal(round(num_bytes))
