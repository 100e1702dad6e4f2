"""`stillhouse generate` with a writer on vLLM, spread over two ranks, in an environment of its own
(`writer.python`): its shards hold what Transformers writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.command import as_toml
from helpers.environments import ROOT
from helpers.vllmtoys import make_toy
from stillhouse.config.generate import load_generate_config
from stillhouse.pipeline import plan_generation
from stillhouse.writer.block import written
from stillhouse.writer.transformers import TransformersWriter

PATIENCE_S = 300.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_toy(tmp_path / "writer", "llama")
    texts = [{"text": "word " * (1 + number % 5) + str(number)} for number in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in texts))
    values: dict[str, dict[str, Any]] = {
        "prompts": {"dataset": str(tmp_path / "prompts.jsonl"), "format": "text"},
        "writer": {
            "model": str(tmp_path / "writer"),
            "engine": "vllm",
            "python": sys.executable,
            "dtype": "float32",
            "num_cpus": 0.5,
            "vllm": {"tensor_parallel": 2, "kv_cache_gb": 0.05},
        },
        "sampling": {"samples": 2, "max_new_tokens": 12, "sequence_length": 60},
        "store": {"url": str(tmp_path / "store"), "shard_prompts": 4},
        "cluster": {"num_cpus": 2, "notices": "off"},
    }
    path = tmp_path / "generate.toml"
    path.write_text(as_toml(values))
    return path


@pytest.mark.filterwarnings("default")
def test_a_writer_of_two_ranks_in_another_environment_writes_what_transformers_writes(
    config: Path, tmp_path: Path
) -> None:
    program = ROOT / ".venv" / "bin" / "python"
    command = [program, "-m", "stillhouse", "generate", config, "--run-dir", tmp_path / "run"]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    # the same recipe, whose engine is no part of it
    plan = plan_generation(
        load_generate_config(config), run_dir=tmp_path / "run", cache_dir=tmp_path / "cache"
    )
    writer = TransformersWriter(plan.config.writer, plan.recipe, device="cpu")
    for number in range(plan.recipe.num_shards):
        found, wanted = (
            plan.store.fetch(number),
            written(plan.block(number), writer, plan.recipe),
        )
        np.testing.assert_array_equal(found.sequences.token_ids_SL, wanted.sequences.token_ids_SL)
        np.testing.assert_allclose(
            found.sampled_logprobs_SL, wanted.sampled_logprobs_SL, rtol=0, atol=1e-4
        )
