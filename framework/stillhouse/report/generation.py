"""What `generate` did, as its report needs it: the journal's events that count, on one clock, and
the headline."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.report.summary import Attempts, Interval, attempts_in, of_kind
from stillhouse.report.words import counted
from stillhouse.tracking import (
    CostEvent,
    GenerationEvent,
    NoticeEvent,
    OutageEvent,
    PoolEvent,
    RunEvent,
    SetAsideEvent,
    ShardEvent,
    StallEvent,
    WriterEvent,
)


@dataclass(frozen=True, slots=True)
class GenerationSummary(Attempts[GenerationEvent]):
    """What was written in one directory."""

    shards: list[ShardEvent]  # that it published, in this order
    cost: CostEvent | None  # the last one; None where nothing was limited

    @property
    def tokens(self) -> list[Interval]:
        """Sampled tokens of each shard that it published."""
        return [
            Interval(max(at - shard.seconds, 0.0), at, shard.num_tokens)
            for at, shard in of_kind(self.timeline, ShardEvent)
            if not shard.duplicate
        ]


@dataclass(slots=True)
class WriterWork:
    """What one writer of one attempt did."""

    attempt: int
    replica: int
    device: str = ""
    seconds_to_ready: float | None = None
    num_shards: int = 0
    num_tokens: int = 0
    seconds: float = 0.0  # at work on the shards that it published


def summarise_generation(events: Sequence[RunEvent]) -> GenerationSummary | None:
    """The summary of a journal; None where no attempt has begun."""
    attempts = attempts_in(events, begins=GenerationEvent)
    if attempts is None:
        return None
    return GenerationSummary(
        **attempts,
        shards=[event for event in events if isinstance(event, ShardEvent) and not event.duplicate],
        cost=next((event for event in reversed(events) if isinstance(event, CostEvent)), None),
    )


def samples_of(shard: ShardEvent) -> int:
    return shard.num_ended + shard.num_cut + shard.num_set_aside


def headline(summary: GenerationSummary) -> str:
    """What is there, and how much of it was written from this directory."""
    start, num_written = summary.start, len(summary.shards)
    what = f"{counted(start.samples, 'sample')} of each of {counted(start.num_prompts, 'prompt')}"
    from_here = f"{num_written:,} of the {start.num_shards:,} shards were written from here"
    if summary.end is not None and summary.end.outcome == "done":
        if num_written >= start.num_shards:
            return f"All {counted(start.num_shards, 'shard')} are written: {what}."
        return f"All shards are in the store: {what}. {from_here}, the others were there already."
    return f"Not all of {what} are written yet: {from_here}; the same command goes on."


def work_of_writers(summary: GenerationSummary) -> list[WriterWork]:
    """Of each writer that was ready or published a shard, by attempt and number."""
    found: dict[tuple[int, int], WriterWork] = {}
    attempt = 0
    for _, event in summary.timeline:
        if isinstance(event, GenerationEvent):
            attempt += 1
        if not isinstance(event, WriterEvent | ShardEvent):
            continue
        key = attempt, event.replica
        work = found.setdefault(key, WriterWork(*key))
        if isinstance(event, WriterEvent):
            work.device, work.seconds_to_ready = event.device, event.seconds_to_ready
        elif not event.duplicate:
            work.num_shards += 1
            work.num_tokens += event.num_tokens
            work.seconds += event.seconds
    return [found[key] for key in sorted(found)]


def mishaps(summary: GenerationSummary) -> list[str]:
    """What went wrong and was mended, in words; empty where nothing did."""
    # the pool's counts begin anew with each attempt, so the last of each attempt count
    last_pools: dict[int, PoolEvent] = {}
    attempt = 0
    for _, event in summary.timeline:
        attempt += isinstance(event, GenerationEvent)
        if isinstance(event, PoolEvent):
            last_pools[attempt] = event
    pools = last_pools.values()

    # how many, of what
    timeline = summary.timeline
    set_aside = [event for _, event in of_kind(timeline, SetAsideEvent)]
    counts = [
        (sum(pool.losses for pool in pools), "lease", "lost with a writer"),
        (sum(pool.late for pool in pools), "lease", "past its deadline"),
        (sum(pool.hedged for pool in pools), "shard", "given to a second writer as well"),
        (sum(shard.duplicate for _, shard in of_kind(timeline, ShardEvent)), "shard", "made twice"),
        (sum(len(event.sequences) for event in set_aside), "prompt", "set aside"),
        (len(of_kind(timeline, StallEvent)), "silent writer", "killed and replaced"),
        (len(of_kind(timeline, OutageEvent)), "long wait", "for a store that was unavailable"),
        (len(of_kind(timeline, NoticeEvent)), "notice", "of a machine's end"),
    ]
    return [f"{counted(count, thing)} {what}" for count, thing, what in counts if count]
