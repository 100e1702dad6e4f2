"""`stillhouse bench pipeline`: teachers and student at the same time, against one process that does
the same work in turn.

Each round measures every way once, one after the other, and ratios are taken within a round: a
machine that is slow for a while is slow for all of them. The ways are the same training: the same
sequences in the same batches, the same models, loss and optimiser.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stillhouse import pipeline
from stillhouse.bench.allocator import KEPT, freed_memory_kept_by_children
from stillhouse.bench.figures import Pace, Spread, steady_pace
from stillhouse.bench.in_turn import Lesson, TimedStep, train_in_turn
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.setting import NUM_CORES, cached, lesson, on_two_cores, prepare, streaming
from stillhouse.cluster.session import attached
from stillhouse.errors import ConfigError
from stillhouse.pipeline import Plan
from stillhouse.tracking import read_journal

_WARM_UP_STEPS = 4  # of the process that works in turn: its first steps allocate
_QUIET = 0.3  # processes that want to run, on the mean of a minute


@dataclass(frozen=True, slots=True)
class InTurn:
    """One process doing teacher and student in turn, once it is warm."""

    num_tokens: int
    seconds: float
    teacher_s: float  # of these

    @classmethod
    def of(cls, steps: Sequence[TimedStep]) -> "InTurn":
        warm = steps[_WARM_UP_STEPS:]
        return cls(
            sum(step.num_tokens for step in warm),
            sum(step.seconds for step in warm),
            sum(step.teacher_s for step in warm),
        )

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Round:
    """Every way once, one after the other."""

    run: Pace
    cached: Pace
    in_turn: InTurn
    in_turn_dense: InTurn


def bench_pipeline(
    work_dir: Path, *, num_steps: int, num_rounds: int, command: str, out: Path | None
) -> None:
    """Measure in a new directory under `work_dir`, print the table; after each round, write all
    that was measured to `out`.

    Raises ConfigError where there is too little to measure.
    """
    if num_rounds < 1 or num_steps <= 2 * _WARM_UP_STEPS:
        raise ConfigError(
            f"{num_rounds} rounds of {num_steps} steps measure nothing; ask for one round or more "
            f"of {4 * _WARM_UP_STEPS} steps or more"
        )
    console = Console(highlight=False, soft_wrap=True)
    with on_two_cores(), freed_memory_kept_by_children():
        provenance = Provenance.of(command)
        if provenance.load_average > _QUIET:
            console.print(
                f"The load average is {provenance.load_average}: other processes want these "
                "cores, and the figures will show it."
            )
        folder = work_dir / provenance.started.replace(":", "")
        folder.mkdir(parents=True)
        config = prepare(folder, num_steps=num_steps)
        plans = [
            streaming(config, folder / f"round-{number}") for number in range(1, num_rounds + 1)
        ]
        rounds: list[Round] = []
        for number, plan in enumerate(plans, 1):
            rounds.append(_round(plan, number, console))
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(record(provenance, plans[0], rounds), indent=2) + "\n")
    console.print(table(rounds))
    console.print(f"In all processes, where it is glibc's, {KEPT}.")


def record(provenance: Provenance, plan: Plan, rounds: Sequence[Round]) -> dict[str, Any]:
    """All that was measured and all that it depends on, as plain values."""
    return {
        "benchmark": "pipeline",
        "provenance": asdict(provenance),
        "config": plan.config.model_dump(mode="json"),
        "rounds": [asdict(found) for found in rounds],
        "tokens_per_s": {way: asdict(spread) for way, spread in paces(rounds).items()},
        "ratios": {ratio: asdict(spread) for ratio, spread in ratios(rounds).items()},
    }


def paces(rounds: Sequence[Round]) -> dict[str, Spread]:
    """Target tokens a second of each way."""
    return {
        way: Spread.of([getattr(found, way).tokens_per_s for found in rounds])
        for way in Round.__slots__
    }


def ratios(rounds: Sequence[Round]) -> dict[str, Spread]:
    """Tokens a second of the pipeline over those of a process that works in turn, taken within each
    round."""
    return {
        f"{ours} / {theirs}": Spread.of(
            [
                getattr(found, ours).tokens_per_s / getattr(found, theirs).tokens_per_s
                for found in rounds
            ]
        )
        for ours in ("run", "cached")
        for theirs in ("in_turn", "in_turn_dense")
    }


def table(rounds: Sequence[Round]) -> Table:
    """What a person wants to know."""
    found = Table(
        title=f"{NUM_CORES} cores, {len(rounds)} rounds: median, and least to most",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    found.add_column("", no_wrap=True)
    for heading in (
        "tokens/s",
        "over\nin turn",
        "over\ndense",
        "student\nwaits",
        "teachers\nbusy",
        "start-up",
    ):
        found.add_column(heading, justify="right", no_wrap=True)
    speeds, shares = paces(rounds), ratios(rounds)
    for way, name in {"run": "run", "cached": "train, cached"}.items():
        stretches: list[Pace] = [getattr(one, way) for one in rounds]
        found.add_row(
            name,
            _shown(speeds[way], ",.0f"),
            _shown(shares[f"{way} / in_turn"], ".2f"),
            _shown(shares[f"{way} / in_turn_dense"], ".2f"),
            f"{median(one.data_wait_s / one.seconds for one in stretches):.0%}",
            f"{median(one.teacher_busy_s / one.seconds for one in stretches):.2f}"
            if way == "run"
            else "",
            f"{median(one.start_up_s for one in stretches):.0f} s",
        )
    for way, name in {"in_turn": "in turn", "in_turn_dense": "in turn, dense"}.items():
        busy = median(getattr(one, way).teacher_s / getattr(one, way).seconds for one in rounds)
        found.add_row(name, _shown(speeds[way], ",.0f"), "", "", "", f"{busy:.2f}", "")
    return found


def _round(plan: Plan, number: int, console: Console) -> Round:
    console.print(
        f"\nRound {number}: run, the same from the store that it filled, one process in turn, the "
        "same with dense targets"
    )
    again = cached(plan)
    with attached(plan.config.cluster):
        pipeline.run(plan)
        pipeline.train(again)
    num_steps = _WARM_UP_STEPS + max(_WARM_UP_STEPS, plan.total_steps // 4)
    found = Round(
        run=_pace(plan),
        cached=_pace(again),
        in_turn=_in_a_fresh_process(lesson(plan, "compressed", num_steps=num_steps)),
        in_turn_dense=_in_a_fresh_process(lesson(plan, "dense", num_steps=num_steps)),
    )
    console.print(
        "  ".join(
            f"{way} {getattr(found, way).tokens_per_s:,.0f} tokens/s" for way in Round.__slots__
        )
    )
    return found


def _pace(plan: Plan) -> Pace:
    order = plan.order
    sequences_per_window = order.window_chunks * order.chunk_sequences
    return steady_pace(
        read_journal(plan.run_dir / "journal.jsonl"),
        window_steps=max(1, sequences_per_window // order.global_batch_sequences),
        chunks_per_step=order.global_batch_sequences / order.chunk_sequences,
    )


def _in_a_fresh_process(work: Lesson) -> InTurn:
    """In a process of its own, so that neither this one's threads and memory nor the other way's
    are in the way."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return InTurn.of(pool.submit(train_in_turn, work).result())


def _shown(spread: Spread, style: str) -> str:
    return f"{spread.median:{style}}\n{spread.least:{style}}–{spread.most:{style}}"
