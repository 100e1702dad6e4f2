"""`stillhouse bench pipeline`: teachers and student at the same time, against one process that does
the same work in turn.

Each round measures every way once, one after the other, and ratios are taken within a round: a
machine that is slow for a while is slow for all of them. The ways are the same training: the same
sequences in the same batches, the same models, loss and optimiser.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from stillhouse import pipeline
from stillhouse.bench.allocator import KEPT, freed_memory_kept_by_children
from stillhouse.bench.figures import Pace, Spread, steady_pace
from stillhouse.bench.in_turn import Lesson, TimedStep, train_in_turn
from stillhouse.bench.output import figures_table, shown, terminal, write_record
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
    console = terminal()
    with on_two_cores(), freed_memory_kept_by_children():
        provenance = Provenance.of(command)
        if provenance.load_average > _QUIET:
            console.print(
                f"The load average is {provenance.load_average}: other processes want these "
                "cores, and the figures will show it."
            )
        # every round is planned before the first begins, so that what cannot be measured fails now
        folder = work_dir / provenance.started.replace(":", "")
        folder.mkdir(parents=True)
        config = prepare(folder, num_steps=num_steps)
        plans = [streaming(config, folder / f"round-{number + 1}") for number in range(num_rounds)]
        rounds: list[Round] = []
        for number, plan in enumerate(plans, 1):
            rounds.append(_round(plan, number, console))
            write_record(
                out,
                "pipeline",
                provenance,
                config=plans[0].config.model_dump(mode="json"),
                rounds=[asdict(each) for each in rounds],
                tokens_per_s={way: asdict(spread) for way, spread in paces(rounds).items()},
                ratios={ratio: asdict(spread) for ratio, spread in ratios(rounds).items()},
            )
    console.print(table(rounds))
    console.print(f"In all processes, where it is glibc's, {KEPT}.")


def paces(rounds: Sequence[Round]) -> dict[str, Spread]:
    """Target tokens a second of each way."""
    return {
        way: Spread.of([getattr(found, way).tokens_per_s for found in rounds])
        for way in Round.__slots__
    }


def ratios(rounds: Sequence[Round]) -> dict[str, Spread]:
    """Tokens a second of the pipeline over those of a process that works in turn, taken within each
    round."""

    def pace(each: Round, way: str) -> float:
        return float(getattr(each, way).tokens_per_s)

    return {
        f"{ours} / {theirs}": Spread.of(pace(each, ours) / pace(each, theirs) for each in rounds)
        for ours in ("run", "cached")
        for theirs in ("in_turn", "in_turn_dense")
    }


def table(rounds: Sequence[Round]) -> Table:
    """Speeds and ratios of each way, and where its time went."""
    title = f"{NUM_CORES} cores, {len(rounds)} rounds: median, and least to most"
    ratio_headings = "over\nin turn", "over\ndense"
    share_headings = "student\nwaits", "teachers\nbusy", "start-up"
    found = figures_table(title, ["", "tokens/s", *ratio_headings, *share_headings])
    speeds, shares = paces(rounds), ratios(rounds)
    # the pipeline
    for way, name in {"run": "run", "cached": "train, cached"}.items():
        stretches: list[Pace] = [getattr(one, way) for one in rounds]
        waits = median(one.data_wait_s / one.seconds for one in stretches)
        busy = median(one.teacher_busy_s / one.seconds for one in stretches)
        found.add_row(
            name,
            shown(speeds[way], ",.0f"),
            shown(shares[f"{way} / in_turn"], ".2f"),
            shown(shares[f"{way} / in_turn_dense"], ".2f"),
            f"{waits:.0%}",
            f"{busy:.2f}" if way == "run" else "",
            f"{median(one.start_up_s for one in stretches):.0f} s",
        )
    # one process that works in turn
    for way, name in {"in_turn": "in turn", "in_turn_dense": "in turn, dense"}.items():
        busy = median(getattr(one, way).teacher_s / getattr(one, way).seconds for one in rounds)
        found.add_row(name, shown(speeds[way], ",.0f"), "", "", "", f"{busy:.2f}", "")
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
    speeds = {way: getattr(found, way).tokens_per_s for way in Round.__slots__}
    console.print("  ".join(f"{way} {speed:,.0f} tokens/s" for way, speed in speeds.items()))
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
    """In a process of its own, which shares no threads and no memory with this one or another
    way's."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return InTurn.of(pool.submit(train_in_turn, work).result())
