"""From the events of a journal to the pace of a run: target tokens a second of wall clock, over a
stretch in which nothing starts or ends.

The stretch begins when a quarter of the steps is done and, where teachers were at work, ends before
their last chunk. Both ends are moved inwards to the end of a shuffle window: a student takes a
window's steps without a pause and may then wait for the next window, so a stretch that began or
ended elsewhere would count waits without their steps, or steps without their waits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from stillhouse.errors import RunError
from stillhouse.tracking import CheckpointEvent, ChunkEvent, RunEvent, latest_train_events


@dataclass(frozen=True, slots=True)
class Pace:
    """The steady stretch of a run, and where its time went. Seconds are of wall clock."""

    first_step: int  # the stretch begins when this step is done
    last_step: int  # and ends when this one is
    num_tokens: int  # target tokens trained on between the two
    seconds: float
    data_wait_s: float  # the student waited for chunks
    checkpoint_s: float  # the student was blocked by checkpoints
    teacher_busy_s: float  # of all teachers, on the chunks that they finished in the stretch
    # published chunks less those that the student had read, at either end of the stretch
    chunks_ahead: tuple[float, float]
    start_up_s: float  # before the stretch: from the start of the run to the end of the first step

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Spread:
    """The same thing measured several times."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        found = list(values)
        return cls(median(found), min(found), max(found))


def steady_pace(events: Sequence[RunEvent], *, window_steps: int, chunks_per_step: float) -> Pace:
    """The pace of a run that began with nothing done and was not interrupted, from its whole
    journal.

    `window_steps` optimiser steps read one shuffle window of chunks, `chunks_per_step` chunks are
    read by one step. Raises RunError where less than one window lies between the first quarter and
    the teachers' last chunk: the run is too short to have had a steady state.
    """
    # the stretch
    steps = latest_train_events(events, "student")
    chunks = [event for event in events if isinstance(event, ChunkEvent)]
    until = chunks[-1].time if chunks else steps[-1].time
    first = -(-len(steps) // (4 * window_steps)) * window_steps
    last = sum(event.time <= until for event in steps) // window_steps * window_steps
    if last <= first:
        raise RunError(
            f"the teachers were done when the student had taken {last} of its {len(steps)} steps, "
            "so less than one shuffle window "
            f"({window_steps} steps) lies between the first quarter and the teachers' end; take "
            "more steps, or narrow store.window_bytes"
        )

    # what happened in it
    begin, end = (steps[step - 1].time for step in (first, last))
    stretch = steps[first:last]
    checkpoints = [event for event in events if isinstance(event, CheckpointEvent)]

    def ahead(step: int, now: float) -> float:
        return (
            sum(event.time <= now for event in chunks) - step * chunks_per_step if chunks else 0.0
        )

    return Pace(
        first_step=first,
        last_step=last,
        num_tokens=sum(event.num_tokens for event in stretch),
        seconds=end - begin,
        data_wait_s=sum(event.data_wait_s for event in stretch),
        checkpoint_s=sum(event.blocking_s for event in checkpoints if begin < event.time <= end),
        teacher_busy_s=sum(event.seconds for event in chunks if begin < event.time <= end),
        chunks_ahead=(ahead(first, begin), ahead(last, end)),
        start_up_s=steps[0].time - events[0].time,
    )
