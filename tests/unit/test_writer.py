"""Writers: a sample is a function of its seed and its prompt, drawn from the distribution that its
log-probability is of, and it ends where it ends itself."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.models import make_model
from helpers.rollouts import small_rollout_recipe
from stillhouse.config.generate import WriterSection
from stillhouse.errors import ModelError, TeacherError
from stillhouse.models.load import load_model
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollouts import CUT, ENDED, SET_ASIDE, pack_rollouts
from stillhouse.writer.block import PromptBlock, written
from stillhouse.writer.engine import Prompt
from stillhouse.writer.sampling import draw, seed_of, uniforms
from stillhouse.writer.transformers import TransformersWriter

VOCAB_SIZE, LENGTH = 300, 40
PROMPTS = [
    Prompt(number, np.arange(30, 30 + n, dtype=np.int32)) for number, n in enumerate((3, 9, 1, 5))
]
# of a model whose distributions are far from uniform, one token in ten ends a sample
END_IDS = tuple(range(0, VOCAB_SIZE, 10))


def recipe_of(**changes: Any) -> RolloutRecipe:
    values = {
        "num_prompts": len(PROMPTS),
        "shard_prompts": len(PROMPTS),
        "samples": 3,
        "sequence_length": LENGTH,
        "max_new_tokens": 16,
        "end_ids": END_IDS,
        "vocab_size": VOCAB_SIZE,
    }
    return small_rollout_recipe(**values | changes)


BLOCK = PromptBlock(0, PROMPTS, frozenset(range(len(PROMPTS))))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is wider than the tokenizer's vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    return make_model(
        folder, vocab_size=320, tokenizer_vocab_size=VOCAB_SIZE, weight_std=0.3, max_positions=64
    )


def writer_of(model: Path, recipe: RolloutRecipe, **section: Any) -> TransformersWriter:
    values = {"model": str(model), "dtype": "float32", "batch_sequences": 5} | section
    return TransformersWriter(WriterSection.model_validate(values), recipe, device="cpu")


def test_two_writers_write_the_same_shard_bit_for_bit(model: Path) -> None:
    recipe = recipe_of()
    first, second = (
        pack_rollouts(written(BLOCK, writer_of(model, recipe), recipe), recipe.fingerprint)
        for _ in range(2)
    )
    assert first == second


def test_a_sample_does_not_depend_on_what_is_written_beside_it(model: Path) -> None:
    recipe = recipe_of()
    together = written(BLOCK, writer_of(model, recipe), recipe)
    alone = written(BLOCK, writer_of(model, recipe, batch_sequences=1), recipe)
    assert together.sequences.token_ids_SL.tolist() == alone.sequences.token_ids_SL.tolist()
    np.testing.assert_allclose(
        together.sampled_logprobs_SL, alone.sampled_logprobs_SL, rtol=0, atol=1e-4
    )
    another = written(BLOCK, writer_of(model, recipe_of(seed=1)), recipe_of(seed=1))
    assert together.sequences.token_ids_SL.tolist() != another.sequences.token_ids_SL.tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.7)])
def test_a_log_probability_is_that_of_the_distribution_it_was_drawn_from(
    model: Path, temperature: float, top_p: float
) -> None:
    recipe = recipe_of(temperature=temperature, top_p=top_p)
    rollouts = written(BLOCK, writer_of(model, recipe), recipe)
    section = WriterSection.model_validate({"model": str(model), "dtype": "float32"})
    teacher = load_model(section, by_document=False)
    for row in range(len(rollouts)):
        ids = torch.from_numpy(rollouts.sequences.token_ids_SL[row].astype(np.int64))
        with torch.inference_mode():
            logits_LV = teacher(ids[None]).logits[0, :, :VOCAB_SIZE]
        for column in np.flatnonzero(rollouts.sequences.loss_mask_SL[row]):
            wanted = reference(logits_LV[column], int(ids[column + 1]), temperature, top_p)
            found = rollouts.sampled_logprobs_SL[row, column]
            assert found == pytest.approx(wanted, abs=1e-4)


def reference(logits_V: torch.Tensor, token: int, temperature: float, top_p: float) -> float:
    """By the definition of nucleus sampling, one token at a time."""
    masses = (logits_V.double() / temperature).softmax(0).tolist()
    kept: dict[int, float] = {}
    for each in sorted(range(len(masses)), key=lambda each: -masses[each]):
        if sum(kept.values()) >= top_p:
            break
        kept[each] = masses[each]
    return float(np.log(kept[token] / sum(kept.values())))


SMALL_STATES = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}


@pytest.mark.parametrize(
    ("architecture", "config"), [("gemma2", {"sliding_window": 8}), ("falcon_h1", SMALL_STATES)]
)
def test_other_architectures_write_side_by_side_what_they_write_alone(
    tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    make_model(
        tmp_path, architecture=architecture, vocab_size=VOCAB_SIZE, weight_std=0.3, config=config
    )
    recipe = recipe_of(samples=1)
    together, alone = (
        written(BLOCK, writer_of(tmp_path, recipe, batch_sequences=size), recipe) for size in (4, 1)
    )
    assert together.sequences.token_ids_SL.tolist() == alone.sequences.token_ids_SL.tolist()


def test_a_model_whose_cache_is_not_used_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path, architecture="mamba", vocab_size=VOCAB_SIZE, weight_std=0.3)
    with pytest.raises(ModelError, match="MambaForCausalLM does not write as it reads"):
        writer_of(tmp_path, recipe_of())


def test_samples_end_with_the_first_token_that_ends_one_or_are_cut(model: Path) -> None:
    recipe = recipe_of(samples=8)
    rollouts = written(BLOCK, writer_of(model, recipe), recipe)
    assert set(rollouts.finish_S.tolist()) == {ENDED, CUT}
    for row in range(len(rollouts)):
        prompt = PROMPTS[rollouts.prompts_S[row]].ids
        ids = rollouts.sequences.token_ids_SL[row]
        sampled = ids[np.flatnonzero(rollouts.sequences.loss_mask_SL[row]) + 1]
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        assert ids[len(prompt) :][: len(sampled)].tolist() == sampled.tolist()
        ends = np.isin(sampled, END_IDS)
        assert not ends[:-1].any()
        assert ends[-1] == (rollouts.finish_S[row] == ENDED)
        assert len(sampled) == 16 or ends[-1]


def test_a_prompt_that_is_set_aside_leaves_blank_rows_and_the_others_as_they_are(
    model: Path,
) -> None:
    recipe = recipe_of()
    writer = writer_of(model, recipe, batch_sequences=1)
    whole, without = written(BLOCK, writer, recipe), written(BLOCK.without([1]), writer, recipe)
    aside_S = without.prompts_S == 1
    assert (without.finish_S == SET_ASIDE).tolist() == aside_S.tolist()
    assert not without.sequences.token_ids_SL[aside_S].any()
    for name, array in without.tensors.items():
        np.testing.assert_array_equal(array[~aside_S], whole.tensors[name][~aside_S])
    only = written(BLOCK.only(2), writer, recipe)
    assert np.flatnonzero(only.finish_S != SET_ASIDE).tolist() == [6, 7, 8]


def test_draws_are_as_frequent_as_the_distribution_says() -> None:
    logits_V = torch.tensor([0.0, 2.0, -torch.inf, 1.0, -3.0])
    shares_B = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for top_p, wanted in ((1.0, logits_V.softmax(0)), (0.8, nucleus(logits_V, [1, 3]))):
        drawn = draw(logits_V.expand(1000, 5), shares_B, temperature=1.0, top_p=top_p)
        counts = Counter(drawn.ids_B.tolist())
        for token in range(5):
            assert counts[token] == pytest.approx(1000 * float(wanted[token]), abs=1.0)
        torch.testing.assert_close(drawn.logprobs_B, wanted.log()[drawn.ids_B])


def nucleus(logits_V: torch.Tensor, kept: list[int]) -> torch.Tensor:
    only_V = torch.full_like(logits_V, -torch.inf)
    only_V[kept] = logits_V[kept]
    return only_V.softmax(0)


def test_the_ends_of_the_range_of_random_numbers_are_tokens_with_mass() -> None:
    logits_BV = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    shares_B = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert draw(logits_BV, shares_B, temperature=1.0, top_p=1.0).ids_B.tolist() == [1, 2]


def test_logits_that_are_no_distribution_are_refused() -> None:
    with pytest.raises(TeacherError, match="not finite"):
        draw(torch.tensor([[torch.nan, 0.0]]), torch.zeros(1), temperature=1.0, top_p=1.0)


def test_random_numbers_are_even_and_differ_between_samples_and_places() -> None:
    seeds_B = torch.tensor([seed_of("recipe", 0, n, 0) for n in range(2000)])
    first_B, second_B = (uniforms(seeds_B, torch.full_like(seeds_B, n)) for n in range(2))
    assert 0 <= float(first_B.min()) < 0.01
    assert 0.99 < float(first_B.max()) < 1
    assert float(first_B.mean()) == pytest.approx(0.5, abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack([first_B, second_B]))[0, 1])) < 0.08
    numbers = {seed_of("recipe", *each) for each in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(numbers | {seed_of("other", 0, 0, 0)}) == 5
