"""A writer on vLLM: what it writes is drawn from the distribution that a Transformers model gives,
by a seed of each sample's own.

Shapes: L positions, V vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.rollouts import small_rollout_recipe
from helpers.vllmtoys import VOCAB_SIZE, make_toy
from stillhouse.config import VllmSection
from stillhouse.config.generate import WriterSection
from stillhouse.errors import ModelError, TeacherError
from stillhouse.models.load import load_model
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollouts import CUT, ENDED, Rollouts
from stillhouse.writer.block import PromptBlock, written
from stillhouse.writer.choice import writer_named
from stillhouse.writer.engine import Prompt
from stillhouse.writer.transformers import TransformersWriter
from stillhouse.writer.vllm import VllmWriter

pytestmark = pytest.mark.filterwarnings("default")
PROMPTS = [
    Prompt(number, np.arange(30, 30 + n, dtype=np.int32)) for number, n in enumerate((3, 40, 1, 5))
]
BLOCK = PromptBlock(0, PROMPTS, frozenset(range(len(PROMPTS))))
END_IDS = tuple(range(0, VOCAB_SIZE, 10))  # one token in ten


def recipe_of(**changes: Any) -> RolloutRecipe:
    values = {
        "num_prompts": len(PROMPTS),
        "shard_prompts": len(PROMPTS),
        "samples": 6,
        "sequence_length": 60,
        "max_new_tokens": 16,
        "end_ids": END_IDS,
        "vocab_size": VOCAB_SIZE,
    }
    return small_rollout_recipe(**values | changes)


def section_of(folder: Path, **settings: Any) -> WriterSection:
    return WriterSection(
        model=str(folder),
        engine="vllm",
        dtype="float32",
        vllm=VllmSection(**({"kv_cache_gb": 0.05} | settings)),
    )


_started: list[VllmWriter] = []  # one that is dropped would take vLLM's groups with it


def started(folder: Path, recipe: RolloutRecipe, **settings: Any) -> VllmWriter:
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()
    _started.append(VllmWriter(section_of(folder, **settings), recipe, device="cpu"))
    return _started[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head has more rows than the tokenizer has tokens."""
    return make_toy(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def writer(model: Path) -> VllmWriter:
    """Of passes of a few tokens, so that prompts are cut."""
    assert writer_named("vllm") is VllmWriter
    return started(model, recipe_of(), max_batched_tokens=32)


@pytest.fixture(scope="module")
def rollouts(writer: VllmWriter) -> Rollouts:
    return written(BLOCK, writer, recipe_of())


def test_log_probabilities_are_those_of_the_model_over_the_tokenizers_ids(
    model: Path, rollouts: Rollouts
) -> None:
    assert_drawn_from(model, rollouts, recipe_of())


def test_they_are_those_after_temperature_and_top_p(model: Path) -> None:
    recipe = recipe_of(temperature=0.5, top_p=0.7, samples=2)
    assert_drawn_from(model, written(BLOCK, started(model, recipe), recipe), recipe)


def assert_drawn_from(model: Path, rollouts: Rollouts, recipe: RolloutRecipe) -> None:
    reference = load_model(section_of(model), by_document=False)
    for row in range(len(rollouts)):
        ids = torch.from_numpy(rollouts.ids(row).astype(np.int64))
        with torch.inference_mode():
            logits_LV = reference(ids[None]).logits[0, :, :VOCAB_SIZE].double()
        for column in np.flatnonzero(rollouts.sequences.loss_mask_SL[row]):
            masses_V, order_V = (
                (logits_LV[column] / recipe.temperature).softmax(0).sort(descending=True)
            )
            kept_V = masses_V.cumsum(0) - masses_V < recipe.top_p
            place = int((order_V == ids[column + 1]).nonzero())
            assert kept_V[place]
            wanted = (masses_V[place] / masses_V[kept_V].sum()).log()
            found = rollouts.sampled_logprobs_SL[row, column]
            assert found == pytest.approx(float(wanted), abs=1e-4)


def test_samples_end_with_the_first_token_that_ends_one_or_are_cut(rollouts: Rollouts) -> None:
    assert set(rollouts.finish_S.tolist()) == {ENDED, CUT}
    for row in range(len(rollouts)):
        sampled = rollouts.sampled_ids(row)
        ends = np.isin(sampled, END_IDS)
        assert not ends[:-1].any()
        assert ends[-1] == (rollouts.finish_S[row] == ENDED)
        assert ends[-1] or len(sampled) == 16


def test_samples_are_those_of_transformers(model: Path, rollouts: Rollouts) -> None:
    """In float32 on a CPU rounding moved none."""
    other = TransformersWriter(section_of(model), recipe_of(), device="cpu")
    wanted = written(BLOCK, other, recipe_of())
    np.testing.assert_array_equal(rollouts.sequences.token_ids_SL, wanted.sequences.token_ids_SL)
    np.testing.assert_allclose(
        rollouts.sampled_logprobs_SL, wanted.sampled_logprobs_SL, rtol=0, atol=1e-4
    )


def test_a_sample_is_a_function_of_its_seed_whatever_is_written_beside_it(
    writer: VllmWriter, rollouts: Rollouts
) -> None:
    again = written(BLOCK, writer, recipe_of())
    np.testing.assert_array_equal(again.sequences.token_ids_SL, rollouts.sequences.token_ids_SL)
    only = written(BLOCK.only(1), writer, recipe_of())
    rows = slice(6, 12)
    np.testing.assert_array_equal(
        only.sequences.token_ids_SL[rows], rollouts.sequences.token_ids_SL[rows]
    )
    sampled = [tuple(rollouts.sampled_ids(row)) for row in range(6)]
    assert len({*sampled}) == 6
    other = written(BLOCK, writer, recipe_of(seed=1))
    assert tuple(other.sampled_ids(0)) != sampled[0]


def test_damaged_weights_are_found_and_the_writer_stays_of_use(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_toy(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = torch.nan  # of one prompt alone
    weights["lm_head.weight"] = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    damaged = started(folder, recipe_of(samples=1))
    with pytest.raises(TeacherError, match="not finite"):
        damaged.write([Prompt(0, np.array([77], np.int32))], [1])
    assert damaged.write([Prompt(0, np.array([78], np.int32))], [1])


def test_heads_without_a_kernel_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = make_toy(tmp_path, "llama", num_heads=4)
    with pytest.raises(ModelError, match=r'16 numbers.*writer\.engine = "transformers"'):
        VllmWriter(section_of(folder), recipe_of(), device="cpu")
