"""The report's figures: inline SVG whose colours and fonts are the page's CSS variables, so that
light and dark need one drawing.

Figures are built on matplotlib's Figure alone: no pyplot, no state that outlives a call.
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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from stillhouse.report import summary as numbers
from stillhouse.report.goodput import Part, student_time, teacher_time
from stillhouse.report.summary import Summary
from stillhouse.report.words import percent, small

_MAX_POINTS = 300
_MAX_BINS = 60

# Colours that mean a CSS variable: matplotlib writes them out, `_render` puts the variable in their
# place.
INK, FAINT, TEACHER, STUDENT, CONTROL, GOOD, BAD = (
    "#010101",
    "#020202",
    "#030303",
    "#040404",
    "#050505",
    "#060606",
    "#070707",
)
_CSS_VARIABLES = {
    INK: "--ink-soft",
    FAINT: "--rule",
    TEACHER: "--teacher",
    STUDENT: "--student",
    CONTROL: "--control",
    GOOD: "--good",
    BAD: "--bad",
}
_PARTS: dict[
    Part, tuple[str, str]
] = {  # in the order of the bar; what is left of it are processors that were given back
    "useful": ("useful", GOOD),
    "waiting": ("waiting for the other side", CONTROL),
    "checkpointing": ("checkpointing", STUDENT),
    "starting": ("starting", INK),
    "restarting": ("restarting", TEACHER),
    "redone": ("redone", BAD),
    "other": ("other", FAINT),
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


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing with its words. `legend` pairs a label with the CSS variable of its colour."""

    title: str
    svg: str
    caption: str
    legend: list[tuple[str, str]] = field(default_factory=list)


def training_panels(summary: Summary) -> list[Panel]:
    """What each step of student and control showed; panels without a single value are left out."""
    # the student is drawn on top
    curves = {
        "control": (summary.control, CONTROL),
        "student": (summary.student, STUDENT),
    }

    def panel(title: str, column: str, unit: str, words: str, *, log: bool = False) -> Panel | None:
        shown = {}
        for role, (rows, colour) in curves.items():
            points = [
                (row.step, value)
                for row in rows
                if (value := getattr(row, column)) is not None and np.isfinite(value)
            ]
            if points and any(value != 0.0 for _, value in points):
                shown[role] = (_thin(points), colour)
        if not shown:
            return None

        def draw(axes: Axes) -> None:
            for (x, y), colour in shown.values():
                axes.plot(x, y, color=colour, marker="." if len(x) == 1 else "")
            if log:
                _log_scale(axes, np.concatenate([y for (_, y), _ in shown.values()]))
            elif max(y.max() for (_, y), _ in shown.values()) < 0.01:
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: small(value)))
            axes.set_xlabel("optimiser step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

        per_point = -(-max(len(rows) for rows, _ in curves.values()) // _MAX_POINTS)
        mean = f" Each point is the mean of {per_point} steps." if per_point > 1 else ""
        legend = [(role, _CSS_VARIABLES[colour]) for role, (_, colour) in reversed(shown.items())]
        return Panel(f"{title}, {unit}" if unit else title, _render(draw), words + mean, legend)

    panels = [
        panel(
            "Divergence from the teacher",
            "divergence",
            "nats a token",
            "Between the stored targets and the student, in training; with draws, the entropy of "
            "the teacher's tail comes on top.",
        ),
        panel(
            "Cross-entropy to the text",
            "cross_entropy",
            "nats a token",
            "On the training batches; held-out values are in the table.",
        ),
        panel("Gradient norm", "grad_norm", "", "Before clipping.", log=True),
        panel("Learning rate", "learning_rate", "", "As the schedule set it."),
    ]
    return [each for each in panels if each is not None]


def fidelity_panels(summary: Summary) -> list[Panel]:
    """Chunk by chunk, what the stored targets keep of the teacher. Needs at least one chunk."""
    kept = _thin([(i, row.kept_mass) for i, row in enumerate(summary.chunks, 1)])
    mean = _thin([(i, row.codec_kl) for i, row in enumerate(summary.chunks, 1)])
    worst = _thin([(i, row.worst_kl) for i, row in enumerate(summary.chunks, 1)], reduce=np.max)

    per_point = -(-len(summary.chunks) // _MAX_POINTS)
    merged = f" Each point stands for {per_point} chunks." if per_point > 1 else ""

    def draw_kept(axes: Axes) -> None:
        _dots(axes, kept, TEACHER)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))

    def draw_kl(axes: Axes) -> None:
        _dots(axes, worst, CONTROL)
        _dots(axes, mean, TEACHER)
        _log_scale(axes, np.concatenate([mean[1], worst[1]]))

    return [
        Panel(
            "Kept mass",
            _render(draw_kept),
            "Mean share of the teacher's probability that lies on the kept entries." + merged,
        ),
        Panel(
            "Codec KL, nats",
            _render(draw_kl),
            "KL(exact ‖ decoded) of the records as stored." + merged,
            [
                ("mean over tokens", _CSS_VARIABLES[TEACHER]),
                ("worst token", _CSS_VARIABLES[CONTROL]),
            ],
        ),
    ]


def pace_panels(summary: Summary) -> list[Panel]:
    """Both sides' speed over time, and who waited for whom; panels without events are left out."""
    panels = []
    scale, unit = _time_unit(summary.run_s)
    lines = {
        "teachers": (numbers.teacher_tokens(summary), TEACHER),
        "student": (numbers.train_tokens(summary, "student"), STUDENT),
        "control": (numbers.train_tokens(summary, "control"), CONTROL),
    }
    lines = {name: (intervals, colour) for name, (intervals, colour) in lines.items() if intervals}

    def draw_rates(axes: Axes) -> None:
        for intervals, colour in lines.values():
            edges = _edges(summary, intervals)
            rate = numbers.per_second(intervals, edges)
            axes.stairs(
                np.where(rate > 0, rate, np.nan),
                edges / scale,
                color=colour,
                linewidth=1.6,
                baseline=None,
            )
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))
        _time_axis(axes, summary, scale, unit)

    if lines:
        legend = [(name, _CSS_VARIABLES[colour]) for name, (_, colour) in lines.items()]
        words = "Target tokens; the clock stops between attempts" + (
            ", which meet at the dotted lines." if summary.resumed_at else "."
        )
        panels.append(Panel("Tokens a second", _render(draw_rates), words, legend))

    waits = {
        "student, for chunks": (numbers.data_waits(summary), STUDENT, 1.0),
        "teachers, for the window": (numbers.window_waits(summary), TEACHER, -1.0),
    }
    waits = {
        name: (intervals, colour, sign)
        for name, (intervals, colour, sign) in waits.items()
        if intervals
    }

    def draw_waits(axes: Axes) -> None:
        for intervals, colour, sign in waits.values():
            edges = _edges(summary, intervals)
            share = np.minimum(numbers.per_second(intervals, edges), 1.0)
            axes.stairs(
                sign * share, edges / scale, color=colour, fill=True, alpha=0.75, linewidth=0
            )
        axes.axhline(0.0, color=INK, linewidth=0.8)
        axes.set_ylim(-1, 1)
        axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["100 %", "50 %", "0", "50 %", "100 %"])
        _time_axis(axes, summary, scale, unit)

    if waits:
        legend = [(name, _CSS_VARIABLES[colour]) for name, (_, colour, _) in waits.items()]
        panels.append(
            Panel(
                "Who waited for whom",
                _render(draw_waits),
                "Share of time: up, the student; down, the teachers.",
                legend,
            )
        )
    return panels


def time_panel(summary: Summary) -> Panel | None:
    """Where the time of students and teachers went; None where neither was at work."""
    found = {"teachers": teacher_time(summary), "students": student_time(summary)}
    sides = {name: spent for name, spent in found.items() if spent is not None}
    if not sides:
        return None
    shown = [part for part in _PARTS if any(spent.share(part) > 0.0005 for spent in sides.values())]

    def draw(axes: Axes) -> None:
        left = np.zeros(len(sides))
        for part in shown:
            width = np.array([spent.share(part) for spent in sides.values()])
            axes.barh(
                list(sides), width, left=left, height=0.56, color=_PARTS[part][1], linewidth=0
            )
            left += width
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.grid(visible=False)

    words = "Shares of the run's time; where a bar ends, the side's work was done. " + " ".join(
        f"Of the {name}' time until then, {percent(spent.goodput)} was useful."
        for name, spent in reversed(sides.items())
    )
    legend = [(_PARTS[part][0], _CSS_VARIABLES[_PARTS[part][1]]) for part in shown]
    return Panel(
        "Share of time", _render(draw, size=(10.3, 0.55 + 0.5 * len(sides))), words, legend
    )


def _dots(axes: Axes, points: tuple[NDArray[np.float64], NDArray[np.float64]], colour: str) -> None:
    axes.plot(*points, color=colour, linestyle="none", marker="o", markersize=3, markeredgewidth=0)
    axes.set_xlabel("chunk, in order of publication")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _thin(
    points: Sequence[tuple[int, float]],
    *,
    reduce: Callable[[NDArray[np.float64]], np.floating] = np.mean,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most _MAX_POINTS points: the mean x and the reduced y of as many equal runs of points."""
    table = np.array(points, dtype=np.float64)
    runs = np.array_split(table, min(len(table), _MAX_POINTS))
    return np.array([run[:, 0].mean() for run in runs]), np.array(
        [reduce(run[:, 1]) for run in runs]
    )


def _edges(summary: Summary, intervals: Sequence[numbers.Interval]) -> NDArray[np.float64]:
    """Bins over the whole run, wide enough that most hold a few events."""
    return np.linspace(
        0.0, max(summary.run_s, 1e-9), int(np.clip(len(intervals) // 3, 1, _MAX_BINS)) + 1
    )


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds > 180 else (1.0, "seconds")


def _time_axis(axes: Axes, summary: Summary, scale: float, unit: str) -> None:
    for at in summary.resumed_at:
        axes.axvline(at / scale, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlim(0, max(summary.run_s, 1e-9) / scale)
    axes.set_xlabel(f"{unit} of run time")


def _log_scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """Logarithmic, where the values spread far enough to need it."""
    positive = values[values > 0]
    if not len(positive) or positive.max() < 4 * positive.min():
        return
    axes.set_yscale("log")
    axes.set_ylim(positive.min() / 1.3, positive.max() * 1.3)
    decades = np.log10(positive.max() / positive.min()) + 0.4
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=8)
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: small(value)))


def _short_count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _render(draw: Callable[[Axes], None], *, size: tuple[float, float] = (5.0, 2.5)) -> str:
    """SVG of so many inches (five are half the page's width), without the preamble that only a file
    of its own needs."""
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = re.sub(
        r'^.*?<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" role="img">',
        file.getvalue(),
        flags=re.DOTALL,
    )
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    for colour, variable in _CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
