"""What a benchmark gives out: tables on the terminal, and a JSON file of every figure."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from stillhouse.bench.figures import Spread
from stillhouse.bench.provenance import Provenance


def terminal() -> Console:
    """A console that leaves the wrapping of long lines to the terminal."""
    return Console(highlight=False, soft_wrap=True)


def figures_table(title: str, headings: Sequence[str]) -> Table:
    """A table without rows: names in the first column, numbers in the others."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def shown(spread: Spread, style: str, *, unit: float = 1.0) -> str:
    """The median, and from least to most below it, in units of `unit`."""
    median, least, most = (value / unit for value in (spread.median, spread.least, spread.most))
    return f"{median:{style}}\n{least:{style}}–{most:{style}}"


def write_record(
    out: Path | None, benchmark: str, provenance: Provenance, **values: object
) -> None:
    """Write all that was measured, and what it depends on, as JSON; nothing where `out` is None."""
    if out is None:
        return
    record = {"benchmark": benchmark, "provenance": asdict(provenance), **values}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
