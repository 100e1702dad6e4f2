"""Generated data on real actors: a writer is killed in the middle of its work, and each prompt has
its samples once all the same; what is published is never changed; and a student trains on it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from helpers.htmlpages import Page
from helpers.models import CHAT_TEMPLATE, make_model
from helpers.promptserver import PromptServer, flat
from helpers.world import TinyWorld
from stillhouse import pipeline
from stillhouse.config.generate import GenerateConfig
from stillhouse.pipeline import Generation
from stillhouse.report import write_report
from stillhouse.sequences.source import whole
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import ENDED, Rollouts, pack_rollouts
from stillhouse.tracking import (
    CostEvent,
    EndEvent,
    GenerationEvent,
    PoolEvent,
    RunEvent,
    ShardEvent,
    WriterEvent,
    read_journal,
)
from stillhouse.tracking.samples import read_samples
from stillhouse.writer.block import written
from stillhouse.writer.transformers import TransformersWriter

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_PROMPTS, SAMPLES, SHARD_PROMPTS = 30, 3, 4
THERE = 5  # the shard that is published before, by another writer


@dataclass(frozen=True)
class Generated:
    """What two commands left: one in which a writer was killed, and one that found everything."""

    plan: Generation
    bytes_before: dict[int, bytes]  # by shard, before the second command
    events: list[RunEvent]  # of both

    def path(self, number: int) -> Path:
        return Path(self.plan.store.url) / self.plan.store.key(number)

    @property
    def shards(self) -> list[Rollouts]:
        return [self.plan.store.fetch(number) for number in range(self.plan.recipe.num_shards)]

    def of_attempt(self, number: int) -> list[RunEvent]:
        starts = [n for n, each in enumerate(self.events) if isinstance(each, GenerationEvent)]
        return self.events[starts[number] : [*starts, len(self.events)][number + 1]]


def plan_in(folder: Path, **writer: Any) -> Generation:
    values = {
        "prompts": {"dataset": str(folder / "prompts.jsonl")},
        "writer": {
            "model": str(folder / "writer"),
            "engine": "helpers.writers:MortalWriter",
            "dtype": "float32",
            "num_cpus": 0.25,
            "batch_sequences": 4,
        }
        | writer,
        "sampling": {"samples": SAMPLES, "max_new_tokens": 20, "sequence_length": 80},
        "store": {"url": str(folder / "store"), "shard_prompts": SHARD_PROMPTS},
        "cluster": {"notices": "off"},
    }
    config = GenerateConfig.model_validate(values)
    return pipeline.plan_generation(config, run_dir=folder / "run", cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    # a writer with many tokens that end a sample, and prompts
    folder = tmp_path_factory.mktemp("generated")
    make_model(
        folder / "writer", vocab_size=300, weight_std=0.3, seed=1, chat_template=CHAT_TEMPLATE
    )
    GenerationConfig(eos_token_id=[*range(0, 300, 12)]).save_pretrained(folder / "writer")
    rows = [
        {"messages": [{"role": "user", "content": f"Count to {number}."}]}
        for number in range(NUM_PROMPTS)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    # a shard that is there already; its log-probabilities are rounded otherwise
    plan = plan_in(folder)
    store = RolloutStore.create(plan.store.url, plan.recipe)
    other = plan.config.writer.model_copy(update={"batch_sequences": 1})
    writer = TransformersWriter(other, plan.recipe, device="cpu")
    store.publish(written(plan.block(THERE), writer, plan.recipe))
    found = Generated(plan, {}, [])
    there = found.path(THERE).read_bytes()

    # the same command twice, but for the number of writers
    pipeline.generate(plan_in(folder, min_replicas=2, max_replicas=2))
    assert found.path(THERE).read_bytes() == there
    for number in range(plan.recipe.num_shards):
        found.bytes_before[number] = found.path(number).read_bytes()
    pipeline.generate(plan)
    found.events.extend(read_journal(folder / "run" / "journal.jsonl"))
    return found


def test_each_prompt_has_its_samples_once_though_a_writer_was_killed(generated: Generated) -> None:
    events = generated.of_attempt(0)
    assert len([each for each in events if isinstance(each, WriterEvent)]) >= 2
    assert [each.losses for each in events if isinstance(each, PoolEvent)][-1] == 1
    shards = [each.shard for each in events if isinstance(each, ShardEvent) and not each.duplicate]
    assert sorted(shards) == sorted({*range(generated.plan.recipe.num_shards)} - {THERE})
    numbers = [
        (int(prompt), int(sample))
        for shard in generated.shards
        for prompt, sample in zip(shard.prompts_S, shard.samples_S, strict=True)
    ]
    assert numbers == [(prompt, n) for prompt in range(NUM_PROMPTS) for n in range(SAMPLES)]


def test_a_shard_is_the_same_whoever_writes_it(generated: Generated) -> None:
    plan = generated.plan
    writer = TransformersWriter(plan.config.writer, plan.recipe, device="cpu")
    for number in generated.bytes_before.keys() - {THERE}:
        rollouts = written(plan.block(number), writer, plan.recipe)
        packed = pack_rollouts(rollouts, plan.recipe.fingerprint)
        assert packed == generated.bytes_before[number]


def test_the_same_command_again_starts_no_writer_and_changes_nothing(generated: Generated) -> None:
    events = generated.of_attempt(1)
    assert not [each for each in events if isinstance(each, ShardEvent | WriterEvent)]
    assert isinstance(events[-1], EndEvent)
    assert events[-1].outcome == "done"
    for number, published in generated.bytes_before.items():
        assert generated.path(number).read_bytes() == published


def test_the_report_tells_what_was_written_and_the_writer_that_was_lost(
    generated: Generated,
) -> None:
    text = Page(write_report(generated.plan.run_dir)).text
    assert "All shards are in the store" in text  # one was there already
    assert "1 lease lost with a writer" in text


def test_a_student_trains_on_the_samples_that_ended_themselves(
    generated: Generated, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    store, fingerprint = generated.plan.store, generated.plan.recipe.fingerprint
    plan = tiny_world.plan(
        tmp_path / "run",
        corpus={"dataset": f"rollouts://{fingerprint[:16]}", "heldout_sequences": 2},
        teacher={"model": str(Path(generated.plan.config.writer.model))},
        student={"max_steps": 2, "checkpoint_every_steps": 2, "global_batch_sequences": 4},
        store={"url": store.url},
    )
    scores = pipeline.run(plan)
    assert scores["student"].num_tokens > 0

    # its report shows samples though the store is out of reach
    before = Page(tmp_path / "run" / "report.html").text
    (account,) = read_samples(tmp_path / "run").values()
    assert account.num_samples == NUM_PROMPTS * SAMPLES
    assert {each.finish for each in account.kept} == {"ended"}
    assert " ".join(account.kept[0].prompt.split()) in before
    Path(store.url).rename(tmp_path / "elsewhere")
    try:
        assert Page(write_report(tmp_path / "run")).text == before
    finally:
        (tmp_path / "elsewhere").rename(store.url)

    # what it learnt is what was sampled of them, and no more
    ended = [
        shard.sequences.token_ids_SL[row, 1:][shard.sequences.loss_mask_SL[row, :-1] == 1]
        for shard in generated.shards
        for row in np.flatnonzero(shard.finish_S == ENDED)
    ]
    labels = []
    for source in (plan.sources.heldout, plan.sources.train):
        rows = whole(source)
        labels += rows.token_ids_SL[:, 1:][rows.loss_mask_SL[:, :-1] == 1].tolist()
    assert 0 < len(labels) <= sum(map(len, ended))
    assert set(labels) <= set(np.concatenate(ended).tolist())


def test_writers_that_ask_a_server_pay_for_each_sample_once(
    generated: Generated,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    folder = Path(generated.plan.config.writer.model).parent
    with PromptServer(flat, reply=lambda request: (str(request["seed"]), "stop")).running() as at:
        at.key = "secret"
        table = {
            "base_url": at.base_url,
            "api_key_env": "A_KEY",
            "usd_per_million_output_tokens": 1e6,
            "max_cost_usd": 20_000,
        }
        plan = plan_in(folder, engine="openai", openai=table, min_replicas=2, max_replicas=2)
        config = plan.config.model_copy(
            update={"store": plan.config.store.model_copy(update={"url": str(tmp_path / "store")})}
        )
        plan = replace(plan, config=config, run_dir=tmp_path / "run")
        pipeline.generate(plan)
        pipeline.generate(plan)  # nothing is left to ask

        # each question once, beside one that proved the server
        assert len(at.requests) == 1 + NUM_PROMPTS * SAMPLES
        seeds = {request["seed"] for request in at.requests}
        assert len(seeds) == len(at.requests)
    assert plan.recipe.writer_kind == "api"
    for number in range(plan.recipe.num_shards):
        assert set(plan.store.fetch(number).finish_S.tolist()) == {ENDED}
    assert not [*tmp_path.glob("store/rollouts/*/purchases/answers/*")]
    assert "of 20000 USD spent or reserved" in capsys.readouterr().err
    [cost] = [
        each
        for each in read_journal(tmp_path / "run" / "journal.jsonl")
        if isinstance(each, CostEvent)
    ]
    assert 0 < cost.granted_usd <= cost.limit_usd == 20_000
