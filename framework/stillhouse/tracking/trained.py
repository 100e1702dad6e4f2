"""What a journal shows was trained: which steps, under which schedule, by how many ranks. A config
holds only what was asked for last."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from stillhouse.tracking.events import Role, Row, StartRow, TrainRow

_ROLES: tuple[Role, ...] = ("student", "control")
_SETTINGS = {  # of a schedule, as a config names them
    "learning_rate": "student.learning_rate",
    "min_learning_rate": "student.min_learning_rate",
    "warmup_steps": "student.warmup_steps",
    "total_steps": "steps",
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """All that the learning rate of a step follows from. It may change between attempts."""

    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    total_steps: int

    def words(self) -> str:
        return (
            f"learning rate {self.learning_rate:g}, warm-up steps {self.warmup_steps:,}, "
            f"then a cosine to {self.min_learning_rate:g} at step {self.total_steps:,}"
        )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring steps that were trained under one schedule."""

    first_step: int
    last_step: int
    schedule: Schedule | None  # None: its attempt was of a version that did not journal it
    peak_learning_rate: float
    world_sizes: tuple[int, ...]  # how many ranks took its steps, ascending

    def words(self) -> str:
        if self.schedule is not None:
            return self.schedule.words()
        return (
            f"learning rate up to {self.peak_learning_rate:g} (the journal does not hold its "
            "schedule)"
        )


def schedule_of(start: StartRow) -> Schedule | None:
    """What an attempt asked for."""
    if start.learning_rate is None or start.min_learning_rate is None or start.warmup_steps is None:
        return None
    return Schedule(
        start.learning_rate, start.min_learning_rate, start.warmup_steps, start.total_steps
    )


def stretches(rows: Iterable[Row], role: Role, *, until: int | None = None) -> list[Stretch]:
    """The steps that led to the weights after step `until`, or to the newest ones, as they were
    last taken."""
    taken = {
        step: each for step, each in _taken(rows, role).items() if until is None or step <= until
    }
    found: list[Stretch] = []
    for step in sorted(taken):
        row, schedule = taken[step]
        own = Stretch(step, step, schedule, row.learning_rate, (row.world_size,))
        if found and found[-1].last_step == step - 1 and found[-1].schedule == schedule:
            found[-1] = _joined(found[-1], own)
        else:
            found.append(own)
    return found


def _taken(rows: Iterable[Row], role: Role) -> dict[int, tuple[TrainRow, Schedule | None]]:
    """Each step's last row, and the schedule of its attempt. Steps after one that is taken again
    are not part of what follows from it."""
    schedule: Schedule | None = None
    taken: dict[int, tuple[TrainRow, Schedule | None]] = {}
    for row in rows:
        if isinstance(row, StartRow):
            schedule = schedule_of(row)
        elif isinstance(row, TrainRow) and row.role == role:
            for later in [step for step in taken if step > row.step] if row.step in taken else ():
                del taken[later]
            taken[row.step] = (row, schedule)
    return taken


def _joined(one: Stretch, other: Stretch) -> Stretch:
    return replace(
        one,
        last_step=other.last_step,
        peak_learning_rate=max(one.peak_learning_rate, other.peak_learning_rate),
        world_sizes=tuple(sorted({*one.world_sizes, *other.world_sizes})),
    )


def words_of(found: Sequence[Stretch]) -> str:
    """The schedules in force, with the steps of each where there are several or where some steps
    are not in the journal."""
    if len(found) == 1 and found[0].first_step == 1:
        return found[0].words()
    return "; ".join(
        f"steps {first:,} to {last:,}: {words}" for first, last, words in _in_turn(found)
    )


def _in_turn(found: Sequence[Stretch]) -> Iterator[tuple[int, int, str]]:
    expected = 1
    for each in found:
        if each.first_step > expected:
            yield expected, each.first_step - 1, "not in this journal"
        yield each.first_step, each.last_step, each.words()
        expected = each.last_step + 1


def nothing_left(earlier: Sequence[Row], start: StartRow) -> str:
    """What an attempt says that trains nothing, because all steps are committed: which of its
    settings have no effect.

    Empty where there is something to train, or where the attempt does not train.
    """
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
    """The settings of a schedule under which no step was taken, each with those that were in
    force."""
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


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
