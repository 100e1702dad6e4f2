"""A block of prompts as a work item, and the rollouts that a writer makes of it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stillhouse.sequence import Sequences
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollouts import CUT, ENDED, SET_ASIDE, UNCHANGING, Rollouts, TopLogprobs
from stillhouse.writer.engine import Prompt, Sample, WriterEngine
from stillhouse.writer.sampling import seed_of


@dataclass(frozen=True, slots=True, eq=False)
class PromptBlock:
    """The prompts of shard `number`; those of `wanted` alone are written to, the others are set
    aside."""

    number: int
    prompts: Sequence[Prompt]
    wanted: frozenset[int]  # by their place in the block

    def only(self, row: int) -> "PromptBlock":
        return replace(self, wanted=frozenset([row]))

    def without(self, rows: Collection[int]) -> "PromptBlock":
        return replace(self, wanted=self.wanted - frozenset(rows))


def written(block: PromptBlock, engine: WriterEngine, recipe: RolloutRecipe) -> Rollouts:
    """The rollouts of a block: `recipe.samples` of each prompt, one prompt after another. A sample
    is a function of the recipe, its numbers and the writer's weights, up to rounding."""
    places = [
        (row, sample) for row in range(len(block.prompts)) for sample in range(recipe.samples)
    ]
    wanted = [place for place in places if place[0] in block.wanted]
    seeds = [
        seed_of(recipe.fingerprint, block.number, block.prompts[row].number, sample)
        for row, sample in wanted
    ]
    samples = engine.write([block.prompts[row] for row, _ in wanted], seeds)
    by_place = dict(zip(wanted, samples, strict=True))
    return _rollouts(block, [(row, by_place.get((row, n))) for row, n in places], recipe)


def _rollouts(
    block: PromptBlock, samples: Sequence[tuple[int, Sample | None]], recipe: RolloutRecipe
) -> Rollouts:
    """Each sample, with the place of its prompt in the block, as a row; None is set aside."""
    # blank rows, as those that are set aside stay
    shape = (len(samples), recipe.sequence_length)
    ids_SL, mask_SL = np.zeros(shape, np.int32), np.zeros(shape, np.uint8)
    logprobs_SL = np.zeros(shape, np.float32)
    finish_S = np.full(len(samples), SET_ASIDE, np.uint8)
    top = TopLogprobs.nothing(*shape, recipe.top_logprobs)

    # a prompt, then what was sampled, each token of which the one before is the context of
    for number, (row, sample) in enumerate(samples):
        if sample is None:
            continue
        prompt = block.prompts[row].ids
        end = len(prompt) + len(sample.ids)
        ids_SL[number, :end] = np.concatenate([prompt, sample.ids])
        mask_SL[number, len(prompt) - 1 : end - 1] = 1
        logprobs_SL[number, len(prompt) - 1 : end - 1] = sample.logprobs
        if sample.top_ids_NK is not None and sample.top_logprobs_NK is not None:
            top.ids_SLK[number, len(prompt) - 1 : end - 1] = sample.top_ids_NK
            top.logprobs_SLK[number, len(prompt) - 1 : end - 1] = sample.top_logprobs_NK
        finish_S[number] = ENDED if sample.ended else CUT
    positions_SL = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    prompts_S = np.array([block.prompts[row].number for row, _ in samples], np.int64)
    return Rollouts(
        number=block.number,
        sequences=Sequences(ids_SL, positions_SL, mask_SL),
        prompts_S=prompts_S,
        samples_S=np.arange(len(samples), dtype=np.int64) % recipe.samples,
        weights_version_S=np.full(len(samples), UNCHANGING, np.int64),
        sampled_logprobs_SL=logprobs_SL,
        finish_S=finish_S,
        top=top if recipe.top_logprobs else None,
    )
