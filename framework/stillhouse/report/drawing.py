"""Drawing for the report: inline SVG whose colours and fonts are the page's CSS variables, so that
one drawing serves light and dark mode.

Stateless: each is drawn on a matplotlib Figure of its own, without pyplot.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from stillhouse.report.words import scientific, small

MAX_POINTS = 300

# Each stands for a CSS variable: matplotlib writes the colour, `render` puts the variable there.
INK, FAINT, TEACHER, STUDENT, CONTROL, GOOD, BAD, HELDOUT = (f"#0{n}0{n}0{n}" for n in range(1, 9))
CSS_VARIABLES = {
    INK: "--ink-soft",
    FAINT: "--rule",
    TEACHER: "--teacher",
    STUDENT: "--student",
    CONTROL: "--control",
    GOOD: "--good",
    BAD: "--bad",
    HELDOUT: "--heldout",
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stillhouse",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


Points = tuple[NDArray[np.float64], NDArray[np.float64]]  # x and y


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing with its words. `legend` pairs a label with the CSS variable of its colour.

    `svg` is empty where the caption alone is enough.
    """

    title: str
    svg: str
    caption: str
    legend: list[tuple[str, str]] = field(default_factory=list)


def thin(
    points: Sequence[tuple[int, float]],
    *,
    reduce: Callable[[NDArray[np.float64]], np.floating] = np.mean,
) -> Points:
    """At most MAX_POINTS points: the mean x and the reduced y of as many equal runs of points."""
    table = np.array(points, dtype=np.float64)
    runs = np.array_split(table, min(len(table), MAX_POINTS))
    x = np.array([run[:, 0].mean() for run in runs])
    return x, np.array([reduce(run[:, 1]) for run in runs])


def log_scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """Logarithmic, where the values spread far enough to need it."""
    positive = values[values > 0]
    if not len(positive) or positive.max() < 4 * positive.min():
        return
    axes.set_yscale("log")
    axes.set_ylim(positive.min() / 1.3, positive.max() * 1.3)
    decades = np.log10(positive.max() / positive.min()) + 0.4
    subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    label = small if positive.min() > 1e-3 else scientific  # one notation on one axis
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def render(draw: Callable[[Axes], None], *, size_inches: tuple[float, float] = (5.0, 2.5)) -> str:
    """The drawing as SVG to be put into a page: five inches are half the page's width."""
    # Draw it.
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size_inches, layout="constrained")
        draw(figure.add_subplot())
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)

    # Leave out what only a file of its own needs, and put the page's variables in.
    opening, plain = r'^.*?<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">'
    svg = re.sub(opening, plain, file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
