"""What was trained, as the journal shows it: which steps, under which schedule, by how many ranks.

The config does not show it: it holds only what was asked for last.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from stillhouse.tracking.events import Role, RunEvent, StartEvent, TrainEvent

_ROLES: tuple[Role, ...] = ("student", "control")
_SETTINGS = {  # the fields of a schedule, as the config names them
    "learning_rate": "student.learning_rate",
    "min_learning_rate": "student.min_learning_rate",
    "warmup_steps": "student.warmup_steps",
    "total_steps": "steps",
    "shape": "student.schedule",
    "decay_steps": "student.decay_steps",
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """All that decides the learning rate of a step. It may change between attempts."""

    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    total_steps: int
    shape: str = "cosine"  # how it falls after the warm-up
    decay_steps: int | None = None  # in which it falls, where it is not at once

    def words(self) -> str:
        """The schedule in a phrase."""
        peak, steps = "", self.decay_steps
        if steps is not None:
            peak = f"its peak until the last {'step' if steps == 1 else f'{steps:,} steps'}, then "
        fall = "cosine" if self.shape == "cosine" else "line"
        return (
            f"learning rate {self.learning_rate:g}, warm-up steps {self.warmup_steps:,}, "
            f"then {peak}a {fall} to {self.min_learning_rate:g} at step {self.total_steps:,}"
        )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps that were trained under one schedule."""

    first_step: int
    last_step: int
    schedule: Schedule | None  # None: the journal is of a version that did not write it
    peak_learning_rate: float
    world_sizes: tuple[int, ...]  # how many ranks took its steps, ascending

    def words(self) -> str:
        """Its schedule in a phrase, or what is known of it."""
        if self.schedule is not None:
            return self.schedule.words()
        return (
            f"learning rate up to {self.peak_learning_rate:g} (the journal does not hold its "
            "schedule)"
        )


def schedule_of(start: StartEvent) -> Schedule | None:
    """The schedule that an attempt asked for; None where its version did not write it."""
    if start.learning_rate is None or start.min_learning_rate is None or start.warmup_steps is None:
        return None
    return Schedule(
        start.learning_rate,
        start.min_learning_rate,
        start.warmup_steps,
        start.total_steps,
        start.schedule,
        start.decay_steps,
    )


def stretches(events: Iterable[RunEvent], role: Role, *, until: int | None = None) -> list[Stretch]:
    """The steps that led to the weights after step `until`, or to the newest weights.

    A step that was taken again counts as it was last taken.
    """
    found: list[Stretch] = []
    for step, (event, schedule) in sorted(_taken(events, role).items()):
        if until is not None and step > until:
            break
        own = Stretch(step, step, schedule, event.learning_rate, (event.world_size,))
        if found and found[-1].last_step == step - 1 and found[-1].schedule == schedule:
            found[-1] = _joined(found[-1], own)
        else:
            found.append(own)
    return found


def _taken(events: Iterable[RunEvent], role: Role) -> dict[int, tuple[TrainEvent, Schedule | None]]:
    """Each step's last event, and the schedule of its attempt.

    Where a step is taken again, the steps behind it no longer lead to the weights.
    """
    schedule: Schedule | None = None
    taken: dict[int, tuple[TrainEvent, Schedule | None]] = {}
    for event in events:
        if isinstance(event, StartEvent):
            schedule = schedule_of(event)
        elif isinstance(event, TrainEvent) and event.role == role:
            if event.step in taken:
                taken = {step: each for step, each in taken.items() if step < event.step}
            taken[event.step] = (event, schedule)
    return taken


def _joined(one: Stretch, other: Stretch) -> Stretch:
    """Two neighbouring stretches of one schedule as one."""
    return replace(
        one,
        last_step=other.last_step,
        peak_learning_rate=max(one.peak_learning_rate, other.peak_learning_rate),
        world_sizes=tuple(sorted({*one.world_sizes, *other.world_sizes})),
    )


def words_of(found: Sequence[Stretch]) -> str:
    """The schedules in words, with the steps of each where there are several, or where some steps
    are not in the journal."""
    if len(found) == 1 and found[0].first_step == 1:
        return found[0].words()
    return "; ".join(
        f"steps {first:,} to {last:,}: {words}" for first, last, words in _in_turn(found)
    )


def _in_turn(found: Sequence[Stretch]) -> Iterator[tuple[int, int, str]]:
    """First step, last step and words of each stretch, and of each gap between two."""
    expected = 1
    for each in found:
        if each.first_step > expected:
            yield expected, each.first_step - 1, "not in this journal"
        yield each.first_step, each.last_step, each.words()
        expected = each.last_step + 1


def nothing_left(earlier: Sequence[RunEvent], start: StartEvent) -> str:
    """The message of an attempt that has nothing to train, because all its steps are committed, and
    which of its settings have no effect.

    Empty where there are steps to train, or where the attempt does not train.
    """
    # Whether all steps are committed.
    committed, asked = start.committed_steps, schedule_of(start)
    if not committed or asked is None or min(committed.values()) < start.total_steps:
        return ""
    steps = min(committed.values())
    begin = (
        f"nothing left to train: all {steps:,} steps are committed"
        if steps == start.total_steps
        else f"nothing left to train: {steps:,} steps are committed, and {start.total_steps:,} "
        "are asked for"
    )

    # Settings that were changed since.
    without_effect = [
        words
        for role in _ROLES
        if role in committed
        for words in _without_effect(stretches(earlier, role), asked)
    ]
    if not without_effect:
        return begin
    return (
        f"{begin}; these settings differ from those it was trained with and had no effect: "
        f"{', '.join(dict.fromkeys(without_effect))}"
    )


def _without_effect(found: Sequence[Stretch], asked: Schedule) -> Iterator[str]:
    """The settings of a schedule under which no step was taken, each with the values under which
    steps were taken."""
    known = [each.schedule for each in found if each.schedule is not None]
    for name, value in asdict(asked).items():
        in_force = dict.fromkeys(getattr(schedule, name) for schedule in known)
        if in_force and value not in in_force:
            yield (
                f"{_SETTINGS[name]} = {_number(value)} (trained with "
                f"{' and '.join(map(_number, in_force))})"
            )
    peaks = [
        each.peak_learning_rate for each in found if each.schedule is None and each.first_step == 1
    ]
    if peaks and not known and asked.learning_rate not in peaks:
        yield (
            f"{_SETTINGS['learning_rate']} = {asked.learning_rate:g} (trained with up to "
            f"{max(peaks):g})"
        )


def _number(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return str(value or "none")
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
