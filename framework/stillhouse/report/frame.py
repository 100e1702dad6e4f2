"""The frame of the report's pages: one HTML file that needs no network, its status line, its tiles
and its resolved configuration."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from stillhouse.redaction import scrub
from stillhouse.report.markup import escape, note
from stillhouse.tracking import EndEvent

Config = Mapping[str, Mapping[str, Any]]  # section -> setting -> value


def framed(body: str, *, title: str) -> str:
    """The whole page. `body` is HTML, and so is `title`."""
    style = (files("stillhouse.report") / "report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · Stillhouse report</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def status(end: EndEvent | None, num_attempts: int) -> str:
    """How the last attempt ended; `end` is None where it has not."""
    if end is None:
        state, words = "open", f"attempt {num_attempts} has no end: running, or killed"
    else:
        state = words = end.outcome
    return f'<span class="status-{escape(state)}">{escape(words)}</span>'


def last_words(end: EndEvent | None) -> str:
    if end is None or not end.message:
        return ""
    return note(f"The last attempt ended with: {end.message}")


def tiles(found: Sequence[tuple[str, str, str]]) -> str:
    """Figures side by side: label, value and detail of each."""
    cells = (
        f'<div class="tile"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value)}</div>'
        f'<div class="detail">{escape(detail)}</div></div>'
        for label, value, detail in found
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def config_in(path: Path) -> Config:
    """The sections of a resolved configuration, scrubbed; empty where the file is absent or
    unreadable, for the journal is enough for a report."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    scrubbed: Config = scrub(sections)
    return scrubbed


def resolved(config: Config, *, name: str) -> str:
    """The configuration, folded; `name` is its file's."""
    if not config:
        return f"<p>The run directory has no readable {name}.</p>"
    summary = "<summary>Resolved configuration, as it was last asked for</summary>"
    return f"<details>{summary}<pre>{escape(json.dumps(config, indent=2))}</pre></details>"
