"""The verb `generate`: a model writes to prompts, and its rollouts fill a store."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import api
from stillhouse.cli.run_verbs import Configs, RunDir
from stillhouse.cluster import machine
from stillhouse.cluster.environment import cache_dir, typed
from stillhouse.model_path import source_of
from stillhouse.redaction import scrub
from stillhouse.terminal import say

if TYPE_CHECKING:
    from stillhouse.pipeline import Generation


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="'SECTION.KEY = VALUE'",
        help="Override one setting: a line of TOML. `stillhouse settings writer` lists some; so do "
        "prompts and sampling.",
    ),
]


def generate(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Have a model write to prompts, to train on. The same command goes on where it stopped."""
    plan = planned_generation(configs, overrides, run_dir)
    from stillhouse import pipeline

    for line in plan.prompts.account.lines():
        say(f"prompts: {line}")
    pipeline.generate(plan, command=typed())
    say("\n" + "\n".join(_last_words(plan)))


def planned_generation(
    configs: list[Path],
    overrides: list[str] | None = None,
    run_dir: Path | None = None,
    *,
    starts_ray: bool = True,
) -> "Generation":
    """The plan of config files and --set values. Mistakes that cost no import are found first."""
    from stillhouse.config.generate import load_generate_config

    config = load_generate_config(configs, overrides or ())
    if starts_ray and config.cluster.address is None:
        machine.require(machine.for_ray(os.environ, num_cpus=config.cluster.num_cpus))
    source_of(config.writer.model)
    cache = cache_dir()
    api.prepare_process(cache)
    from stillhouse import pipeline

    directory = run_dir or Path("runs") / configs[-1].stem
    return pipeline.plan_generation(config, run_dir=directory, cache_dir=cache)


def lines_for_a_run(plan: "Generation") -> list[str]:
    """How to train on the rollouts, in a config of a run: on their log-probabilities, where the
    writer's server was asked for them."""
    recipe = plan.recipe
    names = [json.dumps(grader.title, ensure_ascii=False) for grader in plan.config.graders]
    scores = ", ".join(f"{name} = 1.0" for name in names)
    accepted = [f"min_score = {{{scores}}}"] if names else []
    whole, targets = list[str](), list[str]()
    if recipe.top_logprobs:
        accepted.append("with_logprobs = true")
        whole = ["packing = false", f"sequence_length = {recipe.sequence_length}"]
        model = json.dumps(plan.config.writer.model, ensure_ascii=False)
        targets = ["[teacher]", f"model = {model}", 'engine = "rollouts"']
        targets += ["[target]", f"k = {recipe.top_logprobs}", "tail_draws = 0"]
    return [
        "[corpus]",
        f'dataset = "rollouts://{recipe.fingerprint[:16]}"',
        *whole,
        *(["[corpus.accept]"] if accepted else []),
        *accepted,
        *map(scrub, targets),
        "[store]",
        scrub(f'url = "{plan.store.url}"'),
    ]


def _last_words(plan: "Generation") -> list[str]:
    """What lies where, how the samples ended, and how to train on them."""
    from stillhouse.tracking import ShardEvent, read_journal

    recipe, store = plan.recipe, plan.store
    events = read_journal(plan.run_dir / "journal.jsonl")
    shards = [each for each in events if isinstance(each, ShardEvent) and not each.duplicate]
    ended, cut, aside, num_with_logprobs = (
        sum(getattr(each, name) for each in shards)
        for name in ("num_ended", "num_cut", "num_set_aside", "num_with_logprobs")
    )
    with_logprobs = (
        f" Log-probabilities came with {num_with_logprobs:,}." if recipe.top_logprobs else ""
    )
    return [
        scrub(
            f"{recipe.num_shards:,} shards lie in {store.url}/{store.folder}: {recipe.samples:,} "
            f"samples of each of {recipe.num_prompts:,} prompts."
        ),
        f"Of those that were written from {scrub(str(plan.run_dir))}, {ended:,} ended themselves, "
        f"{cut:,} were cut, and {aside:,} were set aside.{with_logprobs}",
        *_next(plan),
    ]


def _next(plan: "Generation") -> list[str]:
    names = ", ".join(grader.title for grader in plan.config.graders)
    if names:
        return [f"Next: `stillhouse grade`, given the same file, scores them by {names}."]
    which = " and have log-probabilities" if plan.recipe.top_logprobs else ""
    return [
        f"To train on those that ended themselves{which}, in a config of a run:",
        "",
        *lines_for_a_run(plan),
    ]
