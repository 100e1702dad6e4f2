"""The report's figures: inline SVG whose colours and fonts are the page's CSS variables, so that
one drawing serves light and dark mode.

Stateless: each is drawn on a matplotlib Figure of its own, without pyplot.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from stillhouse.report.words import percent, same_power, scientific, small

_MAX_POINTS = 300
_MAX_BINS = 60
_VISIBLE_WAIT = 0.01  # of a bin's time: a bar below it is thinner than a line

# Each stands for a CSS variable: matplotlib writes the colour, `_render` puts the variable there.
INK, FAINT, TEACHER, STUDENT, CONTROL, GOOD, BAD = (f"#0{n}0{n}0{n}" for n in range(1, 8))
_CSS_VARIABLES = {
    INK: "--ink-soft",
    FAINT: "--rule",
    TEACHER: "--teacher",
    STUDENT: "--student",
    CONTROL: "--control",
    GOOD: "--good",
    BAD: "--bad",
}
# In the order of the bar. The rest of a bar is time after the side's processors were given back.
_PARTS: dict[Part, tuple[str, str]] = {
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


def training_panels(summary: Summary) -> list[Panel]:
    """What each step of student and control showed; panels without a single value are left out."""
    panels = [
        _training_panel(
            summary,
            "divergence",
            title="Divergence from the teacher, nats a token",
            caption="Between the stored targets and the student, in training; with draws that have "
            "no weights, the entropy of the teacher's tail comes on top, unless targets hold it.",
        ),
        _training_panel(
            summary,
            "cross_entropy",
            title="Cross-entropy to the text, nats a token",
            caption="On the training batches; held-out values are in the table.",
        ),
        _training_panel(
            summary, "grad_norm", title="Gradient norm", caption="Before clipping.", log=True
        ),
        _training_panel(
            summary, "learning_rate", title="Learning rate", caption="As the schedule set it."
        ),
    ]
    return [panel for panel in panels if panel is not None]


def _training_panel(
    summary: Summary, column: str, *, title: str, caption: str, log: bool = False
) -> Panel | None:
    """One column of the steps of student and control; None where it has no value but zeros."""
    # The curves. The student's is drawn last, on top.
    roles = {"control": (summary.control, CONTROL), "student": (summary.student, STUDENT)}
    curves: dict[str, tuple[Points, str]] = {}
    for role, (steps, colour) in roles.items():
        values = [(step.step, getattr(step, column)) for step in steps]
        points = [(x, y) for x, y in values if y is not None and np.isfinite(y)]
        if any(y != 0.0 for _, y in points):
            curves[role] = (_thin(points), colour)
    if not curves:
        return None
    values_N = np.concatenate([y for (_, y), _ in curves.values()])

    def draw(axes: Axes) -> None:
        for (x, y), colour in curves.values():
            axes.plot(x, y, color=colour, marker="." if len(x) == 1 else "")
        if log:
            _log_scale(axes, values_N)
        elif 0.0 < (largest := float(values_N.max())) < 0.01:
            power = partial(same_power, largest=largest)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    # The words.
    per_point = -(-max(len(steps) for steps, _ in roles.values()) // _MAX_POINTS)
    mean = f" Each point is the mean of {per_point} steps." if per_point > 1 else ""
    legend = [(role, _CSS_VARIABLES[colour]) for role, (_, colour) in reversed(curves.items())]
    return Panel(title, _render(draw), caption + mean, legend)


def fidelity_panels(summary: Summary) -> list[Panel]:
    """Chunk by chunk, what the stored targets keep of the teacher; none without a chunk."""
    if not summary.chunks:
        return []

    # The points.
    numbered = list(enumerate(summary.chunks, 1))
    kept = _thin([(i, chunk.kept_mass) for i, chunk in numbered])
    mean = _thin([(i, chunk.codec_kl) for i, chunk in numbered])
    worst = _thin([(i, chunk.worst_kl) for i, chunk in numbered], reduce=np.max)

    def draw_kept(axes: Axes) -> None:
        _dots(axes, kept, TEACHER)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))

    def draw_kl(axes: Axes) -> None:
        _dots(axes, worst, CONTROL)
        _dots(axes, mean, TEACHER)
        _log_scale(axes, np.concatenate([mean[1], worst[1]]))

    # The words.
    per_point = -(-len(numbered) // _MAX_POINTS)
    merged = f" Each point stands for {per_point} chunks." if per_point > 1 else ""
    share = "Mean share of the teacher's probability that lies on the kept entries."
    legend = [
        ("mean over tokens", _CSS_VARIABLES[TEACHER]),
        ("worst token", _CSS_VARIABLES[CONTROL]),
    ]
    loss = "KL(exact ‖ decoded) of the records as stored."
    return [
        Panel("Kept mass", _render(draw_kept), share + merged),
        Panel("Codec KL, nats", _render(draw_kl), loss + merged, legend),
    ]


def pace_panels(summary: Summary) -> list[Panel]:
    """Both sides' speed over time, and who waited for whom; a panel without data is left out."""
    waits, rates = _waits_panel(summary), _rates_panel(summary)
    return [panel for panel in (rates, waits) if panel is not None]


def _rates_panel(summary: Summary) -> Panel | None:
    """Target tokens a second of teachers, student and control; None where there are none."""
    found = {
        "teachers": (numbers.teacher_tokens(summary), TEACHER),
        "student": (numbers.train_tokens(summary, "student"), STUDENT),
        "control": (numbers.train_tokens(summary, "control"), CONTROL),
    }
    lines = {name: _binned(summary, *line) for name, line in found.items() if line[0]}
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for rate, edges, colour in lines.values():
            shown = np.where(rate > 0, rate, np.nan)
            axes.stairs(shown, edges, color=colour, linewidth=1.6, baseline=None)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))
        _time_axis(axes, summary)

    words = "Target tokens; the clock stops between attempts"
    meet = ", which meet at the dotted lines." if summary.resumed_at else "."
    legend = [(name, _CSS_VARIABLES[colour]) for name, (_, _, colour) in lines.items()]
    return Panel("Tokens a second", _render(draw), words + meet, legend)


def _waits_panel(summary: Summary) -> Panel | None:
    """The share of time that each side waited; a sentence where the bars would be too low to see.
    None where nothing was measured."""
    # The two sides, as far as they were at work.
    found = {
        "student, for chunks": (numbers.data_waits(summary), STUDENT),
        "teachers, for the window": (numbers.window_waits(summary), TEACHER),
    }
    sides = {name: _binned(summary, *side) for name, side in found.items() if side[0]}
    if not sides:
        return None
    title = "Who waited for whom"
    if all(share.max() < _VISIBLE_WAIT for share, _, _ in sides.values()):
        waits = "; ".join(sides)
        return Panel(title, "", f"The share of time waited ({waits}) was under 1 % throughout.")

    # Bars: the student's up, the teachers' down.
    def draw(axes: Axes) -> None:
        for share, edges, colour in sides.values():
            shown = np.minimum(share, 1.0) * (1 if colour == STUDENT else -1)
            axes.stairs(shown, edges, color=colour, fill=True, alpha=0.75, linewidth=0)
        axes.axhline(0.0, color=INK, linewidth=0.8)
        axes.set_ylim(-1, 1)
        axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["100 %", "50 %", "0", "50 %", "100 %"])
        _time_axis(axes, summary)

    legend = [(name, _CSS_VARIABLES[colour]) for name, (_, _, colour) in sides.items()]
    return Panel(
        title, _render(draw), "Share of time: up, the student; down, the teachers.", legend
    )


def time_panel(summary: Summary) -> Panel | None:
    """Where the time of students and teachers went; None where neither was at work."""
    # The sides that were at work, and the parts that took any time.
    found = {"teachers": teacher_time(summary), "students": student_time(summary)}
    sides = {name: spent for name, spent in found.items() if spent is not None}
    if not sides:
        return None
    shown = [part for part in _PARTS if any(side.share(part) > 0.0005 for side in sides.values())]

    def draw(axes: Axes) -> None:
        left = np.zeros(len(sides))
        for part in shown:
            width = np.array([side.share(part) for side in sides.values()])
            colour = _PARTS[part][1]
            axes.barh([*sides], width, left=left, height=0.56, color=colour, linewidth=0)
            left += width
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.grid(visible=False)

    # The words.
    useful = " ".join(
        f"Of the {name}' time until then, {percent(side.goodput)} was useful."
        for name, side in reversed(sides.items())
    )
    words = f"Shares of the run's time; where a bar ends, the side's work was done. {useful}"
    keys = [_PARTS[part] for part in shown]
    legend = [(label, _CSS_VARIABLES[colour]) for label, colour in keys]
    svg = _render(draw, size_inches=(10.3, 0.55 + 0.5 * len(sides)))
    return Panel("Share of time", svg, words, legend)


# ---- Points, bins and axes


def _dots(axes: Axes, points: Points, colour: str) -> None:
    axes.plot(*points, color=colour, linestyle="none", marker="o", markersize=3, markeredgewidth=0)
    axes.set_xlabel("chunk, in order of publication")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _thin(
    points: Sequence[tuple[int, float]],
    *,
    reduce: Callable[[NDArray[np.float64]], np.floating] = np.mean,
) -> Points:
    """At most _MAX_POINTS points: the mean x and the reduced y of as many equal runs of points."""
    table = np.array(points, dtype=np.float64)
    runs = np.array_split(table, min(len(table), _MAX_POINTS))
    x = np.array([run[:, 0].mean() for run in runs])
    return x, np.array([reduce(run[:, 1]) for run in runs])


def _binned(
    summary: Summary, intervals: Sequence[numbers.Interval], colour: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """The rate in each of B bins over the whole run, their B + 1 edges on the time axis, and the
    colour. Bins are wide enough that most hold a few events."""
    num_bins = int(np.clip(len(intervals) // 3, 1, _MAX_BINS))
    edges_s = np.linspace(0.0, max(summary.run_s, 1e-9), num_bins + 1)
    return numbers.per_second(intervals, edges_s), edges_s / _time_unit(summary)[0], colour


def _time_unit(summary: Summary) -> tuple[float, str]:
    """The unit of the time axis: its seconds and its name."""
    if summary.run_s > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if summary.run_s > 180 else (1.0, "seconds")


def _time_axis(axes: Axes, summary: Summary) -> None:
    unit_s, unit = _time_unit(summary)
    for at in summary.resumed_at:
        axes.axvline(at / unit_s, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlim(0, max(summary.run_s, 1e-9) / unit_s)
    axes.set_xlabel(f"{unit} of run time")


def _log_scale(axes: Axes, values: NDArray[np.float64]) -> None:
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


def _short_count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


# ---- SVG


def _render(draw: Callable[[Axes], None], *, size_inches: tuple[float, float] = (5.0, 2.5)) -> str:
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
    for colour, variable in _CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
