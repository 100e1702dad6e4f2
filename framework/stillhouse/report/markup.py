"""The report's HTML building blocks: escaped text, tables and figures.

Invariant: every text that came from outside passes `escape`.
"""

import html
from collections.abc import Sequence

from stillhouse.redaction import scrub
from stillhouse.report.drawing import Panel

ABSENT = "–"


def escape(value: object) -> str:
    """A text from outside, fit for HTML and free of secrets."""
    return html.escape(scrub(str(value)))


def table(css_class: str, names: Sequence[str], body: str) -> str:
    """A table under the names of its columns; `body` is the HTML of its rows."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return (
        f'<div class="scroll"><table class="{css_class}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(found: Sequence[tuple[str, str]], *, fingerprint: str) -> str:
    """Names and values as a table of two columns, and the recipe's fingerprint; a value that is
    empty is not known, and left out."""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in found
        if value
    )
    recipe = f"<tr><th>Recipe</th><td><code>{escape(fingerprint)}</code></td></tr>"
    return f'<table class="facts"><tbody>{body}{recipe}</tbody></table>'


def note(words: str) -> str:
    return f'<p class="note">{escape(words)}</p>'


def panels(drawn: Sequence[Panel], otherwise: str) -> str:
    """Figures side by side, or a sentence where there are none."""
    if not drawn:
        return f"<p>{escape(otherwise)}</p>"
    return f'<div class="panels">{"".join(map(panel, drawn))}</div>'


def panel(drawn: Panel) -> str:
    """A figure with its title, legend and caption."""
    keys = "".join(
        f'<span><span class="key" style="background:var({variable})"></span>{escape(label)}</span>'
        for label, variable in drawn.legend
    )
    title = f'<div class="title">{escape(drawn.title)}<span class="legend">{keys}</span></div>'
    svg = drawn.svg.replace("<svg ", f'<svg aria-label="{escape(drawn.title)}" ', 1)
    caption = f"<figcaption>{escape(drawn.caption)}</figcaption>"
    return f"<figure>{title}{svg}{caption}</figure>"
