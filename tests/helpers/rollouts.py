"""Recipes of rollouts, and shards of them that no model wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.sequence import Sequences
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollouts import CUT, ENDED, SET_ASIDE, UNCHANGING, Rollouts, TopLogprobs

LENGTH, VOCAB_SIZE = 12, 300


def small_rollout_recipe(**changes: Any) -> RolloutRecipe:
    """Five prompts, two samples of each, in shards of two prompts."""
    values: dict[str, Any] = {
        "prompts_digest": "some-prompts",
        "num_prompts": 5,
        "shard_prompts": 2,
        "samples": 2,
        "sequence_length": LENGTH,
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 0,
        "end_ids": (0,),
        "vocab_size": VOCAB_SIZE,
        "vocabulary_digest": "some-vocabulary",
        "writer_kind": "weights",
        "writer_digest": "some-weights",
        "writer_numerics": "float32",
    }
    return RolloutRecipe(**values | changes)


def make_shard(recipe: RolloutRecipe, number: int, *, salt: int = 0) -> Rollouts:
    """A shard of random ids. Of a prompt's samples the first ends itself, and the others are cut;
    those of prompt 3 are set aside."""
    random = np.random.default_rng((salt, number))
    prompts = np.array(recipe.shard_rows(number))
    prompts_S = np.repeat(prompts, recipe.samples)
    samples_S = np.tile(np.arange(recipe.samples), len(prompts))
    length = recipe.sequence_length
    ids_SL = np.zeros((len(prompts_S), length), np.int32)
    mask_SL = np.zeros(ids_SL.shape, np.uint8)
    finish_S = np.where(samples_S == 0, ENDED, CUT).astype(np.uint8)
    finish_S[prompts_S == 3] = SET_ASIDE
    for row in np.flatnonzero(finish_S != SET_ASIDE):
        prompt, end = 2 + int(prompts_S[row]) % 3, length - 2 - int(samples_S[row])
        ids_SL[row, :end] = random.integers(1, recipe.vocab_size, end)
        ids_SL[row, :prompt] = 10 + prompts_S[row]
        mask_SL[row, prompt - 1 : end - 1] = 1
    positions_SL = np.tile(np.arange(length, dtype=np.int32), (len(ids_SL), 1))
    return Rollouts(
        number=number,
        sequences=Sequences(ids_SL, positions_SL, mask_SL),
        prompts_S=prompts_S,
        samples_S=samples_S,
        weights_version_S=np.full(len(ids_SL), UNCHANGING),
        sampled_logprobs_SL=-random.random(ids_SL.shape, np.float32) * mask_SL,
        finish_S=finish_S,
        top=_told(random, mask_SL, finish_S, recipe) if recipe.top_logprobs else None,
    )


def _told(
    random: np.random.Generator, mask_SL: np.ndarray, finish_S: np.ndarray, recipe: RolloutRecipe
) -> TopLogprobs:
    """Of every other rollout that ended itself nothing, and of the others all but the end."""
    num_rows, length = mask_SL.shape
    told = TopLogprobs.nothing(num_rows, length, recipe.top_logprobs)
    for row in range(0, num_rows, 2):
        places = np.flatnonzero(mask_SL[row])
        for at in places[:-1] if finish_S[row] == ENDED else places:
            ids_K = random.choice(recipe.vocab_size, recipe.top_logprobs, replace=False)
            logprobs_K = np.log(random.dirichlet(np.ones(recipe.top_logprobs + 1))[:-1])
            order_K = np.argsort(-logprobs_K.astype(np.float32))
            told.ids_SLK[row, at] = ids_K[order_K]
            told.logprobs_SLK[row, at] = logprobs_K[order_K]
    return told


def write_sums(folder: Path, *, num_prompts: int, model: Path, config: str) -> None:
    """A config file with its data set of sums, and its writer beside it."""
    rows = [{"question": f"{n}+{n + 10}=", "answer": f"{2 * n + 10}"} for n in range(num_prompts)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "writer").symlink_to(model)
    (folder / "maths.toml").write_text(config)
