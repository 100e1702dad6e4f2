"""The report's figures, as panels of the page: what training, targets and pace looked like.

Each function takes the summary of a run; how a panel is drawn is in `drawing`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from stillhouse.report import summary as numbers
from stillhouse.report.drawing import (
    BAD,
    CONTROL,
    CSS_VARIABLES,
    FAINT,
    GOOD,
    HELDOUT,
    INK,
    MAX_POINTS,
    STUDENT,
    TEACHER,
    Panel,
    Points,
    log_scale,
    render,
    thin,
)
from stillhouse.report.generation import GenerationSummary, samples_of
from stillhouse.report.goodput import Part, student_time, teacher_time
from stillhouse.report.summary import Summary
from stillhouse.report.words import percent, same_power
from stillhouse.tracking import HeldoutEvent, TrainEvent

_MAX_BINS = 60
_VISIBLE_WAIT = 0.01  # of a bin's time: a bar below it is thinner than a line

# In the order of the bar. The rest of a bar is time after the side's processors were given back.
_PARTS: dict[Part, tuple[str, str]] = {
    "useful": ("useful", GOOD),
    "waiting": ("waiting for the other side", CONTROL),
    "scoring": ("scoring held-out text", HELDOUT),
    "checkpointing": ("checkpointing", STUDENT),
    "starting": ("starting", INK),
    "restarting": ("restarting", TEACHER),
    "redone": ("redone", BAD),
    "other": ("other", FAINT),
}


class _Clock(Protocol):
    """A run's own clock: how long it ran, and where attempts meet."""

    @property
    def run_s(self) -> float: ...

    @property
    def resumed_at(self) -> list[float]: ...


def training_panels(summary: Summary) -> list[Panel]:
    """What each step of student and control showed; panels without a single value are left out."""
    steps = _curves_of(summary.student, summary.control)
    constant = ", with a constant" if summary.start.loss_constant else ""
    panels = [
        _steps_panel(
            steps,
            "divergence",
            title=f"Divergence from the teacher{constant}, nats a token",
            caption=f"Between the stored targets and the student, in training{_why(summary)}.",
        ),
        _steps_panel(
            steps,
            "cross_entropy",
            title="Cross-entropy to the text, nats a token",
            caption="On the training batches; held-out values are in the table.",
        ),
        _steps_panel(
            steps, "grad_norm", title="Gradient norm", caption="Before clipping.", log=True
        ),
        _steps_panel(
            steps, "learning_rate", title="Learning rate", caption="As the schedule set it."
        ),
    ]
    return [panel for panel in panels if panel is not None]


def _why(summary: Summary) -> str:
    """Why the divergence has a constant on top, or when it has."""
    match summary.start.loss_constant:
        case True:
            return (
                "; the entropy of the teacher's tail, which draws without weights bring in and the "
                "targets do not hold, is on top, so it does not fall to 0"
            )
        case False:
            return ""
    return (
        "; with draws that have no weights, the entropy of the teacher's tail comes on top, unless "
        "targets hold it"
    )


def heldout_panels(summary: Summary) -> list[Panel]:
    """How student and control did on held-out text while they learned; none where they were not
    scored."""
    scores = _curves_of(summary.heldout["student"], summary.heldout["control"])
    tokens = max(
        (each.num_tokens for found in summary.heldout.values() for each in found), default=0
    )
    text = (
        f"On the same {tokens:,} held-out target tokens at every point, both distributions exact."
    )
    panels = [
        _steps_panel(
            scores,
            "kl",
            title="Held-out KL(teacher ‖ model), nats a token",
            caption=f"{text}{_lowest(summary)}",
        ),
        _steps_panel(
            scores, "cross_entropy", title="Held-out cross-entropy, nats a token", caption=text
        ),
    ]
    return [panel for panel in panels if panel is not None]


def _lowest(summary: Summary) -> str:
    """Where the student was nearest to its teacher, where that was not at the last score."""
    found = summary.heldout["student"]
    best = min(found, key=lambda event: event.kl, default=None)
    if best is None or best.kl == found[-1].kl:
        return ""
    return f" The student was nearest to its teacher after step {best.step:,}: {best.kl:.3f}."


_Steps = Sequence[TrainEvent] | Sequence[HeldoutEvent]


def _curves_of(student: _Steps, control: _Steps) -> dict[str, tuple[_Steps, str]]:
    """The steps of both roles, each with its colour. The student's is drawn last, on top."""
    return {"control": (control, CONTROL), "student": (student, STUDENT)}


def _steps_panel(
    roles: Mapping[str, tuple[_Steps, str]],
    column: str,
    *,
    title: str,
    caption: str,
    log: bool = False,
) -> Panel | None:
    """One column of the steps of student and control; None where it has no value but zeros."""
    # The curves.
    curves: dict[str, tuple[Points, str]] = {}
    for role, (steps, colour) in roles.items():
        values = [(step.step, getattr(step, column)) for step in steps]
        points = [(x, y) for x, y in values if y is not None and np.isfinite(y)]
        if any(y != 0.0 for _, y in points):
            curves[role] = (thin(points), colour)
    if not curves:
        return None
    values_N = np.concatenate([y for (_, y), _ in curves.values()])

    def draw(axes: Axes) -> None:
        for (x, y), colour in curves.values():
            axes.plot(x, y, color=colour, marker="." if len(x) == 1 else "")
        if log:
            log_scale(axes, values_N)
        elif 0.0 < (largest := float(values_N.max())) < 0.01:
            power = partial(same_power, largest=largest)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    # The words.
    per_point = -(-max(len(steps) for steps, _ in roles.values()) // MAX_POINTS)
    mean = f" Each point is the mean of {per_point} steps." if per_point > 1 else ""
    legend = [(role, CSS_VARIABLES[colour]) for role, (_, colour) in reversed(curves.items())]
    return Panel(title, render(draw), caption + mean, legend)


def fidelity_panels(summary: Summary) -> list[Panel]:
    """Chunk by chunk, what the stored targets keep of the teacher; none without a chunk."""
    if not summary.chunks:
        return []

    # The points.
    numbered = list(enumerate(summary.chunks, 1))
    kept = thin([(i, chunk.kept_mass) for i, chunk in numbered])
    mean = thin([(i, chunk.codec_kl) for i, chunk in numbered])
    worst = thin([(i, chunk.worst_kl) for i, chunk in numbered], reduce=np.max)

    def draw_kept(axes: Axes) -> None:
        _dots(axes, kept, TEACHER)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))

    def draw_kl(axes: Axes) -> None:
        _dots(axes, worst, CONTROL)
        _dots(axes, mean, TEACHER)
        log_scale(axes, np.concatenate([mean[1], worst[1]]))

    # The words.
    per_point = -(-len(numbered) // MAX_POINTS)
    merged = f" Each point stands for {per_point} chunks." if per_point > 1 else ""
    share = "Mean share of the teacher's probability that lies on the kept entries."
    legend = [
        ("mean over tokens", CSS_VARIABLES[TEACHER]),
        ("worst token", CSS_VARIABLES[CONTROL]),
    ]
    loss = "KL(exact ‖ decoded) of the records as stored."
    return [
        Panel("Kept mass", render(draw_kept), share + merged),
        Panel("Codec KL, nats", render(draw_kl), loss + merged, legend),
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
    return _rates_of(summary, found, words="Target tokens; the clock stops between attempts")


def writing_panels(generation: GenerationSummary) -> list[Panel]:
    """The writers' speed over time, and how the samples of each shard ended; none without a
    shard."""
    if not generation.shards:
        return []
    found = {"writers": (generation.tokens, TEACHER)}
    rates = _rates_of(generation, found, words="Sampled tokens; the clock stops between attempts")

    # of each shard
    shares = [
        (number, shard.num_ended / max(samples_of(shard), 1))
        for number, shard in enumerate(generation.shards, 1)
    ]
    ended = thin(shares)

    def draw(axes: Axes) -> None:
        _dots(axes, ended, GOOD, of="shard")
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))

    per_point = -(-len(shares) // MAX_POINTS)
    merged = f" Each point stands for {per_point} shards." if per_point > 1 else ""
    words = f"Of each shard's samples; the others were cut or set aside.{merged}"
    drawn = Panel("Samples that ended themselves", render(draw), words)
    return [drawn] if rates is None else [rates, drawn]


def _rates_of(
    clock: _Clock, found: Mapping[str, tuple[Sequence[numbers.Interval], str]], *, words: str
) -> Panel | None:
    """Tokens a second by name, each in its colour; None where there are none."""
    lines = {name: _binned(clock, *line) for name, line in found.items() if line[0]}
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for rate, edges, colour in lines.values():
            shown = np.where(rate > 0, rate, np.nan)
            axes.stairs(shown, edges, color=colour, linewidth=1.6, baseline=None)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))
        _time_axis(axes, clock)

    meet = ", which meet at the dotted lines." if clock.resumed_at else "."
    legend = [(name, CSS_VARIABLES[colour]) for name, (_, _, colour) in lines.items()]
    return Panel("Tokens a second", render(draw), words + meet, legend)


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

    legend = [(name, CSS_VARIABLES[colour]) for name, (_, _, colour) in sides.items()]
    return Panel(title, render(draw), "Share of time: up, the student; down, the teachers.", legend)


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
    legend = [(label, CSS_VARIABLES[colour]) for label, colour in keys]
    svg = render(draw, size_inches=(10.3, 0.55 + 0.5 * len(sides)))
    return Panel("Share of time", svg, words, legend)


# ---- Points, bins and axes


def _dots(axes: Axes, points: Points, colour: str, *, of: str = "chunk") -> None:
    axes.plot(*points, color=colour, linestyle="none", marker="o", markersize=3, markeredgewidth=0)
    axes.set_xlabel(f"{of}, in order of publication")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _binned(
    clock: _Clock, intervals: Sequence[numbers.Interval], colour: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """The rate in each of B bins over the whole run, their B + 1 edges on the time axis, and the
    colour. Bins are wide enough that most hold a few events."""
    num_bins = int(np.clip(len(intervals) // 3, 1, _MAX_BINS))
    edges_s = np.linspace(0.0, max(clock.run_s, 1e-9), num_bins + 1)
    return numbers.per_second(intervals, edges_s), edges_s / _time_unit(clock)[0], colour


def _time_unit(clock: _Clock) -> tuple[float, str]:
    """The unit of the time axis: its seconds and its name."""
    if clock.run_s > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if clock.run_s > 180 else (1.0, "seconds")


def _time_axis(axes: Axes, clock: _Clock) -> None:
    unit_s, unit = _time_unit(clock)
    for at in clock.resumed_at:
        axes.axvline(at / unit_s, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlim(0, max(clock.run_s, 1e-9) / unit_s)
    axes.set_xlabel(f"{unit} of run time")


def _short_count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
