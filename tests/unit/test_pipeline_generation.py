"""A generation is decided before anything heavy starts: what cannot be written is refused, and a
run's plan reads what was written."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from helpers.models import CHAT_TEMPLATE, make_model
from helpers.world import TinyWorld, merged
from stillhouse.config.generate import GenerateConfig
from stillhouse.errors import ConfigError, RecipeError
from stillhouse.pipeline import Generation, plan_generation
from stillhouse.pipeline.generate import generate
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import ENDED
from stillhouse.tracking import GenerationEvent, PhaseEvent, PoolEvent, ProgressView, StallEvent
from stillhouse.writer.block import written
from stillhouse.writer.transformers import TransformersWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    make_model(
        folder / "writer", vocab_size=300, weight_std=0.3, seed=1, chat_template=CHAT_TEMPLATE
    )
    GenerationConfig(eos_token_id=[*range(7, 900, 12)]).save_pretrained(folder / "writer")
    rows = [{"messages": [{"role": "user", "content": f"Count to {n}."}]} for n in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def planned(folder: Path, **changes: dict[str, Any]) -> Generation:
    values: dict[str, Any] = {
        "prompts": {"dataset": str(folder / "prompts.jsonl")},
        "writer": {"model": str(folder / "writer"), "dtype": "float32"},
        "sampling": {"samples": 2, "max_new_tokens": 20, "sequence_length": 80},
        "store": {"url": str(folder / "store"), "shard_prompts": 4},
    }
    config = GenerateConfig.model_validate(merged(values, changes))
    return plan_generation(config, run_dir=folder / "run", cache_dir=folder / "cache")


def test_the_plan_names_all_that_decides_a_sample(folder: Path) -> None:
    plan = planned(folder)
    recipe = plan.recipe
    assert (recipe.num_prompts, recipe.num_shards, recipe.samples) == (10, 3, 2)
    assert recipe.end_ids == (0, *range(7, 300, 12))  # the tokenizer's, and those below its size
    assert recipe.writer_numerics == "float32"
    assert [len(plan.block(number).prompts) for number in range(3)] == [4, 4, 2]
    assert [prompt.number for prompt in plan.block(2).prompts] == [8, 9]
    assert planned(folder).recipe == recipe
    for changes in (
        {"prompts": {"seed": 1}},
        {"writer": {"dtype": "bfloat16"}},
        {"sampling": {"seed": 1}},
        {"store": {"shard_prompts": 5}},
    ):
        assert planned(folder, **changes).recipe.fingerprint != recipe.fingerprint


def test_what_is_longer_than_the_writers_context_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"sequence_length is 513, but .* made for 512 tokens"):
        planned(folder, sampling={"sequence_length": 513})


def test_a_directory_of_something_else_is_refused(folder: Path) -> None:
    plan = planned(folder)
    plan.run_dir.mkdir()
    (plan.run_dir / "recipe.json").write_bytes(
        planned(folder, sampling={"seed": 2}).recipe.canonical_json()
    )
    with pytest.raises(RecipeError, match="belongs to a run, or to prompts, a writer or sampling"):
        generate(plan)
    assert [each.name for each in plan.run_dir.iterdir() if each.name != "lock"] == ["recipe.json"]


def test_a_run_reads_what_was_written(folder: Path, tiny_world: TinyWorld, tmp_path: Path) -> None:
    plan = planned(folder)
    store = RolloutStore.create(plan.store.url, plan.recipe)
    writer, num_ended = TransformersWriter(plan.config.writer, plan.recipe, device="cpu"), 0
    for number in range(plan.recipe.num_shards):
        rollouts = written(plan.block(number), writer, plan.recipe)
        num_ended += int((rollouts.finish_S == ENDED).sum())
        store.publish(rollouts)
    own = f"rollouts://{plan.recipe.fingerprint[:16]}"
    corpus = {"dataset": own, "heldout_sequences": 1}
    run = tiny_world.plan(
        tmp_path / "run",
        corpus=corpus,
        teacher={"model": str(folder / "writer")},
        store={"url": store.url},
    )
    assert run.config.corpus.dataset == f"rollouts://{store.url}/{plan.recipe.fingerprint[:16]}"
    (part,) = run.sources.parts
    assert part.account.num_documents == num_ended > 0
    assert run.recipe.source_kind == "corpus"


def test_the_terminal_shows_writers_and_shards() -> None:
    from io import StringIO

    from rich.console import Console

    shown = StringIO()
    start = GenerationEvent(1, "stillhouse generate a.toml", {}, "w", "0" * 64, 8, 30, 3, 2, 0)
    pool = PoolEvent(3, 8, 2, 8, 100.0, 0.0, 0, replicas=2, time=2.0)
    with ProgressView(Console(file=shown, width=100), clock=lambda: 1.0, every_s=0.0) as view:
        view.record(start)
        view.record(PhaseEvent("writer", "loading"))
        view.record(pool)
        view.record(StallEvent("writer", 1, 0, "work", 300.0, "", 4))
    assert shown.getvalue().splitlines() == [
        "writers: starting",
        "writers: loading, 0:01, 0 of 2 ready",
        "writers 3/8 shards, 2 in flight, 0 tokens/s, ETA ?",
        "writer 1 stood still for 300 s (work, shard 4): it is killed and replaced",
    ]
