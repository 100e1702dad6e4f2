"""The verb `grade`: graders give verdicts on what `generate` wrote."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillhouse import api
from stillhouse.cli.generate import Overrides, lines_for_a_run
from stillhouse.cli.run_verbs import Configs
from stillhouse.cluster.environment import cache_dir
from stillhouse.errors import ConfigError
from stillhouse.model_path import source_of
from stillhouse.terminal import printable, say

if TYPE_CHECKING:
    from stillhouse.pipeline import Generation, Grades


def grade(configs: Configs, overrides: Overrides = None) -> None:
    """Score what a model wrote, by the config's graders. The same command goes on where it stopped;
    a new grader scores what is there already."""
    # mistakes that cost no import are found first
    from stillhouse.config.generate import load_generate_config

    config = load_generate_config(configs, overrides or ())
    if not config.graders:
        raise ConfigError(
            f'{configs[-1]} has no grader; add a table, such as [[graders]] with kind = "exact"'
        )
    source_of(config.writer.model)
    cache = cache_dir()
    api.prepare_process(cache)

    # the verdicts
    from stillhouse import pipeline

    directory = Path("runs") / configs[-1].stem  # of `generate`; nothing is written there
    plan = pipeline.plan_generation(config, run_dir=directory, cache_dir=cache)
    with _shown() as on_progress:
        grades = pipeline.grade(plan, on_progress=on_progress)
    _print(grades)
    say("\n" + "\n".join(_last_words(plan, grades)))


@contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    """Show on the terminal how many verdicts are there."""
    with Console(stderr=True).status("grading") as status:

        def on_progress(num_done: int, num_verdicts: int) -> None:
            status.update(f"grading: {num_done:,} of {num_verdicts:,} verdicts")

        yield on_progress


def _print(grades: "Sequence[Grades]") -> None:
    """The closing table: a line for each grader, over all its verdicts."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("grader")
    for heading in ("samples", "mean score", "of score 1"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("without a score, which count as 0; of this command")
    for each in grades:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in each.without_score.items())
        table.add_row(
            Text(printable(each.name)),
            f"{each.num_samples:,}",
            f"{each.mean_score:.3f}",
            f"{each.full_share:.1%}",
            Text(printable(reasons)),
        )
    Console().print(table)


def _last_words(plan: "Generation", grades: "Sequence[Grades]") -> list[str]:
    """What is not there yet; or else how to train on what the graders accept."""
    num_missing = plan.recipe.num_shards - min(each.num_shards for each in grades)
    if num_missing:
        return [
            f"{num_missing:,} of {plan.recipe.num_shards:,} shards are not written yet: "
            "`stillhouse generate` goes on with them, and `stillhouse grade` with their verdicts."
        ]
    return [
        "To train on the samples to which all graders give 1, in a config of a run:",
        "",
        *lines_for_a_run(plan),
    ]
