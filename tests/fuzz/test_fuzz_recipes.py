"""Whatever recipe.json says, it is refused with RecipeError or is a recipe of which every part can
be asked for."""

import json
import random
from functools import partial

from helpers.bounded import bounded
from helpers.chunks import make_chunk, small_recipe
from helpers.mutants import dumps, mutated_bytes, mutated_json
from stillhouse.errors import ChunkError, RecipeError
from stillhouse.store import Recipe
from stillhouse.store.chunk import index_bytes, pack_chunk, parse_index
from stillhouse.store.recipe import parse_recipe

BASES = (
    small_recipe(),
    small_recipe(k=0, num_draws=3, packing="padded", temperature=0.5),
    small_recipe(value_bits=6, num_draws=4),
    small_recipe(format=2),
    small_recipe(format=2, num_draws=4, weighted=True, label_logprob=True, tail_entropy=True),
)
MUTANTS = 1200
COUNTS = ("num_sequences", "sequence_length", "chunk_sequences", "vocab_size", "num_draws")
HUGE = (2**20, 2**31 - 1, 2**31, 2**32, 2**61, 2**62, 2**63, 2**64, 10**30)


def mutant(rng: random.Random, recipe: Recipe) -> bytes:
    """Its bytes changed, or its values, which are then written as a recipe is."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, recipe.canonical_json())
    values = json.loads(recipe.canonical_json())
    if rng.random() < 0.2:
        huge = {name: rng.choice(HUGE) for name in rng.sample(COUNTS, rng.randint(1, 3))}
        return dumps(values | huge, sort_keys=True, separators=(",", ":"))
    return dumps(mutated_json(rng, values), sort_keys=True, separators=(",", ":"))


def use(recipe: Recipe, data: bytes) -> None:
    """What a reader of any chunk asks of a recipe before it has seen a byte that it trusts."""
    assert recipe.spec.bytes_per_token > 0
    assert len(recipe.fingerprint) == 64
    assert -(2**63) <= recipe.draw_seed < 2**63
    for number in (0, recipe.num_chunks - 1):
        head = data[: index_bytes(recipe, number)]
        for num_bytes in (len(data), 2**62):
            bounded(
                partial(parse_index, head, recipe, number, num_bytes=num_bytes),
                num_bytes=len(data),
                refusal=ChunkError,
            )


def test_a_recipe_is_what_was_written_or_is_refused_with_recipe_error(rng: random.Random) -> None:
    packed = pack_chunk(make_chunk(BASES[0], 0), BASES[0])
    num_read = 0
    for _ in range(MUTANTS):
        data = mutant(rng, rng.choice(BASES))
        recipe = bounded(
            partial(parse_recipe, data, where="recipe.json"),
            num_bytes=len(data),
            refusal=RecipeError,
        )
        if recipe is not None:
            num_read += 1
            assert recipe.canonical_json() == data, data
            use(recipe, packed)
    assert num_read > MUTANTS // 20
