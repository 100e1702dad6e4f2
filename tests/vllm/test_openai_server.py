"""vLLM's own server, on loopback, scores prompts as the model itself does, and says of its own text
what the model does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.chunks import make_chunk, small_recipe
from helpers.models import CHAT_TEMPLATE, make_model
from helpers.rollouts import small_rollout_recipe
from stillhouse.config import ScoringSection, TeacherSection
from stillhouse.config.generate import WriterSection
from stillhouse.engines.openai import OpenAIEngine
from stillhouse.engines.probe import mean_kl, require_same_teacher
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.errors import ServerError, TeacherError
from stillhouse.logits import concatenate
from stillhouse.models.token_bytes import bytes_by_id
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.sequence import WorkItem
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.writer.engine import Prompt
from stillhouse.writer.openai import OpenAIWriter

LENGTH, MOST_ENTRIES = 96, 64
RECIPE = small_recipe(
    format=2, teacher_kind="api", k=32, label_logprob=True, vocab_size=320,
    sequence_length=LENGTH, num_sequences=4,
)  # fmt: skip
ITEM = WorkItem(0, make_chunk(RECIPE).sequences)
_START_S = 240.0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its heads are of a size that vLLM has kernels for on CPUs. It writes text of ASCII alone, and
    ends it: a channel of its hidden states is the same everywhere, and decides that."""
    folder = make_model(
        tmp_path_factory.mktemp("teacher"), hidden_size=128, num_heads=2, weight_std=0.2, seed=3,
        tied=False, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    names = bytes_by_id(load_tokenizer(str(folder)))
    unwanted = [number for number, name in names.items() if number in (1, 2) or name[-1] >= 0x80]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 16.0  # above 1 in the final states
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[unwanted, 0] = -40.0
        model.lm_head.weight[0, 0] = 2.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_url(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": teacher, "served-model-name": "toy", "host": "127.0.0.1", "port": port,
        "dtype": "float32", "max-logprobs": MOST_ENTRIES, "max-model-len": LENGTH + 1,
        "kv-cache-memory-bytes": 2**26, "max-num-seqs": 8,
    }  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"),
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its engine is a process of its own
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5.0).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def engine_of(base_url: str, teacher: Path, folder: Path, **options: int) -> OpenAIEngine:
    values = {"base_url": base_url, "served_model": "toy", "max_logprobs": MOST_ENTRIES, **options}
    section = TeacherSection(
        model=str(teacher), engine="openai", openai=ScoringSection.model_validate(values)
    )
    return OpenAIEngine(section, RECIPE, device="cpu", store_url=str(folder / "store"))


def test_its_targets_are_those_of_transformers(
    base_url: str, teacher: Path, tmp_path: Path
) -> None:
    engine = engine_of(base_url, teacher, tmp_path)
    engine.prove()
    found = concatenate(engine.targets(ITEM))
    local = TeacherSection(model=str(teacher), dtype="float32")
    wanted = concatenate(TransformersEngine(local, RECIPE, device="cpu").targets(ITEM))
    assert mean_kl(wanted, found) <= 1e-6
    for name in ("tail_logmass_T", "label_logprob_T"):
        np.testing.assert_allclose(found.tensors[name], wanted.tensors[name], atol=1e-4)
    assert (found.token_ids_TK == wanted.token_ids_TK).double().mean() > 0.99
    records = torch.cat([part.records_TB for part in engine.records(ITEM)])
    assert records.shape == (ITEM.sequences.num_targets, RECIPE.spec.bytes_per_token)


def test_two_of_its_clients_are_the_same_teacher(
    base_url: str, teacher: Path, tmp_path: Path
) -> None:
    first, other = (engine_of(base_url, teacher, tmp_path).probe() for _ in range(2))
    require_same_teacher(first, other, replica=1)


def test_more_entries_than_it_gives_are_refused_in_its_own_words(
    base_url: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=r"status 400: .*65.*64"):
        engine_of(base_url, teacher, tmp_path, max_logprobs=MOST_ENTRIES + 1).prove()


def test_the_only_model_that_it_lists_is_the_teacher(base_url: str, teacher: Path) -> None:
    section = TeacherSection(
        model=str(teacher), engine="openai", openai=ScoringSection(base_url=base_url)
    )
    found = OpenAIEngine.identity(section, cache_dir=teacher)
    assert found.served_model == "toy"
    nowhere = ScoringSection(base_url=base_url.replace("/v1", "/v2"))
    with pytest.raises(ServerError, match="status 404"):
        OpenAIEngine.identity(section.model_copy(update={"openai": nowhere}), cache_dir=teacher)


TURNS = [{"role": "user", "content": "Hello?"}]
NUM_TOLD = 20


@pytest.mark.parametrize("source", [{"messages": TURNS}, {"text": "def "}], ids=["chat", "text"])
def test_every_token_of_what_it_writes_is_one_id_with_the_models_log_probabilities(
    base_url: str, teacher: Path, tmp_path: Path, source: dict[str, Any]
) -> None:
    # samples of one prompt
    recipe = small_rollout_recipe(
        writer_kind="api", num_prompts=16, shard_prompts=16, samples=1, sequence_length=LENGTH,
        max_new_tokens=24, end_ids=(0,), vocab_size=320, top_logprobs=NUM_TOLD,
    )  # fmt: skip
    RolloutStore.create(str(tmp_path), recipe)
    openai = {"base_url": base_url, "served_model": "toy", "top_logprobs": NUM_TOLD}
    section = WriterSection.model_validate(
        {"model": str(teacher), "engine": "openai", "openai": openai}
    )
    writer = OpenAIWriter(section, recipe, device="cpu", store_url=str(tmp_path))
    prompts = [Prompt(row, np.array([3], np.int32), json.dumps(source)) for row in range(16)]
    samples = writer.write(prompts, range(16))

    # its prompt, and what the model itself says after it
    tokenizer = load_tokenizer(str(teacher))
    text = source.get("text") or tokenizer.apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer.encode(str(text))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    for sample in samples:
        assert sample is not None
        assert sample.top_ids_NK is not None, "each of its tokens is one id"
        assert sample.top_logprobs_NK is not None
        with torch.no_grad():
            logits_LV = model(torch.tensor([prompt + sample.ids.tolist()])).logits[0, :, :320]
        logprobs_NV = logits_LV.log_softmax(dim=1)[len(prompt) - 1 : -1]
        told_NK = torch.from_numpy(sample.top_logprobs_NK)
        exact_NK = logprobs_NV.gather(1, torch.from_numpy(sample.top_ids_NK).long())
        np.testing.assert_allclose(told_NK, exact_NK, atol=1e-3)
        sampled_N = logprobs_NV.gather(1, torch.from_numpy(sample.ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(sample.logprobs, sampled_N, atol=1e-3)  # the end's as well

        # the likeliest; in a chat an unlikely token that was sampled is told in place of the last
        best_NK = logprobs_NV.topk(NUM_TOLD, dim=1).values
        np.testing.assert_allclose(told_NK[:, :-1], best_NK[:, :-1], atol=1e-3)
        is_best_N = (told_NK[:, -1] - best_NK[:, -1]).abs() < 1e-3
        is_sampled_N = torch.from_numpy(sample.top_ids_NK[:, -1] == sample.ids)
        assert (is_best_N | is_sampled_N).all()
    assert {True, False} == {sample.ended for sample in samples if sample is not None}
