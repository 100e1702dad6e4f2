"""From an API to a student: a server writes and tells its top log-probabilities, and a real run,
which loads no teacher, stores them as the targets and learns from them.

Shapes: L tokens of a sequence, T targets, K entries, V vocabulary.
"""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.buying import BRIEF
from helpers.calls import must_not_be_called
from helpers.models import CHAT_TEMPLATE, make_tokenizer
from helpers.promptserver import Answer, PromptServer, Teller
from helpers.world import TinyWorld, merged
from stillhouse import pipeline
from stillhouse.cli.generate import lines_for_a_run
from stillhouse.config.generate import GenerateConfig
from stillhouse.evaluation.scores import ModelName
from stillhouse.logits import decode
from stillhouse.losses.score import Scores
from stillhouse.models.token_bytes import bytes_by_id
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.pipeline import Plan
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.tracking import ChunkEvent, TrainEvent, read_journal
from stillhouse.writer.actor import Written, computed, published
from stillhouse.writer.openai import OpenAIWriter

K_TOLD, K, NUM_PROMPTS, STEPS = 6, 4, 24, 3
TURNS = [1, 2]  # special tokens that are no end


@dataclass(frozen=True)
class Served:
    """The model behind the server."""

    model: Any

    def logprobs_of(self, ids: list[int]) -> Tensor:
        """[L, V]: it never writes turns of a chat."""
        with torch.no_grad():
            logits_LV: Tensor = self.model(torch.tensor([ids])).logits[0]
        logits_LV[:, TURNS] = -torch.inf
        return logits_LV.log_softmax(dim=1)


@pytest.fixture(scope="module")
def served(tiny_world: TinyWorld) -> Served:
    path = str(tiny_world.folder / "teacher")
    return Served(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With questions, and a tokenizer without a model."""
    folder = tmp_path_factory.mktemp("told")
    make_tokenizer(folder / "tokenizer", vocab_size=300, chat_template=CHAT_TEMPLATE)
    turns = [[{"role": "user", "content": f"{n} + {n}?"}] for n in range(NUM_PROMPTS)]
    lines = [json.dumps({"messages": turn}) + "\n" for turn in turns]
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder


def answer(request: Answer) -> tuple[str, str]:
    """With a character of three bytes, which no token has whole."""
    number = int(request["messages"][-1]["content"].split()[0])
    return f"that is {2 * number} \N{SNOWMAN}", "stop"


@pytest.fixture(scope="module")
def server(folder: Path, served: Served) -> Iterator[PromptServer]:
    """It says nothing of the end, as OpenAI's does."""
    tokenizer = load_tokenizer(str(folder / "tokenizer"))

    def prompt_ids(asked: Answer) -> list[int]:
        text = tokenizer.apply_chat_template(
            asked["messages"], tokenize=False, add_generation_prompt=True
        )
        return [*tokenizer.encode(str(text))]

    names = bytes_by_id(tokenizer)
    teller = Teller(lambda text: [*tokenizer.encode(text)], names, prompt_ids)
    with PromptServer(served.logprobs_of, reply=answer, teller=teller).running() as running:
        yield running


def written(server: PromptServer, folder: Path, store: Path) -> dict[str, Any]:
    """What the command `generate` does, in this process: the lines that it prints for a run."""
    openai = {"base_url": server.base_url, "served_model": "toy", "top_logprobs": K_TOLD}
    values = {
        "prompts": {"dataset": str(folder / "questions.jsonl")},
        "writer": {"model": str(folder / "tokenizer"), "engine": "openai", "openai": openai},
        "sampling": {"samples": 1, "max_new_tokens": 24, "sequence_length": 64},
        "store": {"url": str(store), "shard_prompts": 8},
    }
    plan = pipeline.plan_generation(
        GenerateConfig.model_validate(values), run_dir=store / "g", cache_dir=store / "cache"
    )
    rollouts = RolloutStore.create(plan.store.url, plan.recipe)
    writer = OpenAIWriter(
        plan.config.writer, plan.recipe, device="cpu", store_url=plan.store.url, patience=BRIEF
    )
    writer.prove(plan.block(0).prompts[0])
    for number in range(plan.recipe.num_shards):
        shard = computed(rollouts, plan.block(number), writer)
        found = published(rollouts, shard, tell=must_not_be_called)
        assert isinstance(found, Written)
        assert (found.num_with_logprobs, found.num_ended) == (8, 8)
    return tomllib.loads("\n".join(lines_for_a_run(plan)))


@dataclass(frozen=True)
class Trained:
    plan: Plan
    scores: dict[ModelName, Scores]


@pytest.fixture(scope="module")
def trained(
    tiny_world: TinyWorld,
    ray_cluster: dict[str, float],
    server: PromptServer,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    assert ray_cluster["CPU"] >= 1
    run_dir = tmp_path_factory.mktemp("run")
    lines = written(server, folder, run_dir / "store")
    more = {
        "corpus": {"heldout_sequences": 2},
        "target": {"k": K},
        "student": {"max_steps": STEPS},
    }
    plan = tiny_world.plan(run_dir / "run", **merged(lines, more))
    return Trained(plan, pipeline.run(plan))


def test_the_targets_of_a_chunk_are_the_top_k_of_the_model_behind_the_api(
    trained: Trained, served: Served
) -> None:
    plan, num_sequences = trained.plan, 0
    for number in plan.chunks:
        chunk = plan.store.fetch(number)
        found = decode(torch.from_numpy(chunk.targets_NB), plan.recipe.spec)
        rows, start = chunk.sequences, 0
        for ids_L, mask_L in zip(rows.token_ids_SL, rows.loss_mask_SL, strict=True):
            # of a sequence, but of its end
            places = np.flatnonzero(mask_L)
            end, num_sequences = start + len(places), num_sequences + 1
            ids, told = ids_L[: places[-1] + 2].tolist(), slice(start, end - 1)
            logprobs_TV = served.logprobs_of(ids)[places[:-1]]
            wanted_TK = logprobs_TV.topk(K, dim=1).values

            # ids and values, to the codec's precision
            exact_TK = logprobs_TV.gather(1, found.token_ids_TK[told].long())
            ordered_TK = exact_TK.sort(dim=1, descending=True).values
            torch.testing.assert_close(ordered_TK, wanted_TK, atol=1e-5, rtol=0.0)
            torch.testing.assert_close(found.logprobs_TK[told], exact_TK, atol=0.02, rtol=0.01)
            rest_T = (-wanted_TK.exp().sum(dim=1)).log1p()
            torch.testing.assert_close(found.tail_logmass_T[told], rest_T, atol=0.01, rtol=0.01)

            # and the end, of which nothing was told
            assert int(found.token_ids_TK[end - 1, 0]) == ids[-1] == 0
            assert float(found.logprobs_TK[end - 1, 0]) == 0.0
            start = end
    assert num_sequences == NUM_PROMPTS - 2


def test_a_student_learns_from_them_and_is_scored_without_a_teacher(trained: Trained) -> None:
    events = read_journal(trained.plan.run_dir / "journal.jsonl")
    steps = [event for event in events if isinstance(event, TrainEvent)]
    assert len(steps) == STEPS
    assert all(0 < event.loss < float("inf") for event in steps)
    chunks = [event for event in events if isinstance(event, ChunkEvent)]
    assert sorted(event.chunk for event in chunks) == sorted(trained.plan.chunks)
    assert max(event.codec_kl for event in chunks) < 1e-4
    ((name, scores),) = trained.scores.items()
    assert name == "student"
    assert scores.kl != scores.kl  # nan: compared with nothing
