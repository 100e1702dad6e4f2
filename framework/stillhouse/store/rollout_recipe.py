"""The recipe of rollouts: every choice that decides how they are written, in clear, and its
fingerprint.

Rollouts are facts: a shard that was lost cannot be made again with the same values. So equal
recipes mean the same rules, and only the shards of one store are the same rollouts.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from stillhouse.errors import RecipeError
from stillhouse.store.recipe import MOST_CHUNKS, canonical_json

_VERSION = 1
_MOST_COUNT = 2**31 - 1  # ids and positions are stored in 32 bits
_IN_JSON = {"prompts_digest": "prompts", "vocabulary_digest": "vocabulary"}
_OF_WRITER = ("kind", "digest", "numerics")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRecipe:
    """Every choice that decides a rollout. Raises RecipeError on a value that no store can have.

    The chat template is in it by what it makes: the prompts' ids, which `prompts_digest` is of.
    """

    prompts_digest: str
    num_prompts: int
    shard_prompts: int  # prompts in a shard
    samples: int  # of each prompt
    sequence_length: int  # tokens of a prompt with its sample
    max_new_tokens: int  # after which a sample is cut
    temperature: float
    top_p: float
    seed: int
    end_ids: tuple[int, ...]  # of the tokens with which a sample ends itself
    vocab_size: int
    vocabulary_digest: str  # of the tokens that the ids stand for
    writer_kind: str
    writer_digest: str
    writer_numerics: str
    top_logprobs: int = 0  # entries that a server is asked for with each sampled token

    def __post_init__(self) -> None:
        problems = [*_wrong_types(self)] or [*_wrong_values(self)]
        if problems:
            raise RecipeError("this recipe of rollouts cannot be used: " + "; ".join(problems))

    @property
    def num_shards(self) -> int:
        return -(-self.num_prompts // self.shard_prompts)

    def shard_rows(self, number: int) -> range:
        """The prompts of shard `number`; the last shard may be short. Raises RecipeError outside
        0 .. num_shards - 1."""
        if not 0 <= number < self.num_shards:
            raise RecipeError(
                f"there is no shard {number}: this recipe has {self.num_shards} shards, counted "
                "from 0"
            )
        start = number * self.shard_prompts
        return range(start, min(start + self.shard_prompts, self.num_prompts))

    def canonical_json(self) -> bytes:
        """ASCII JSON of every field: sorted keys, no spaces. These are the bytes of recipe.json.
        `top_logprobs` is absent where it is 0."""
        values = {_IN_JSON.get(name, name): value for name, value in asdict(self).items()}
        if not self.top_logprobs:
            del values["top_logprobs"]
        writer = {name: values.pop(f"writer_{name}") for name in _OF_WRITER}
        return canonical_json({**values, "version": _VERSION, "writer": writer})

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits: sha256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json()).hexdigest()


def parse_rollout_recipe(data: bytes, *, where: str) -> RolloutRecipe:
    """Read recipe.json. Raises RecipeError, naming `where`, unless `data` is what `canonical_json`
    writes, byte for byte."""
    try:
        values = json.loads(data)
        if values.pop("version") != _VERSION:
            raise RecipeError(
                f"{where} is of another version than {_VERSION}; use the Stillhouse that wrote it"
            )
        writer = values.pop("writer")
        values |= {f"writer_{name}": writer.pop(name) for name in _OF_WRITER}
        values |= {name: values.pop(key) for name, key in _IN_JSON.items()}
        values["end_ids"] = tuple(values["end_ids"])
        recipe = RolloutRecipe(**values)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{where} is not a recipe of rollouts ({error}); it is damaged: move its directory away"
        ) from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    if recipe.canonical_json() != data:
        raise RecipeError(
            f"{where} is not in canonical form, so its fingerprint means nothing; it was edited: "
            "restore or move it away"
        )
    return recipe


def rollout_differences(recipe: RolloutRecipe, other: RolloutRecipe) -> list[str]:
    """The fields in which two recipes differ: the value of the first against that of the second."""
    mine, theirs = asdict(recipe), asdict(other)
    return [
        f"{name}: {mine[name]!r} against {theirs[name]!r}"
        for name in mine
        if mine[name] != theirs[name]
    ]


def _wrong_types(recipe: RolloutRecipe) -> Iterable[str]:
    for field in fields(RolloutRecipe):
        value: Any = getattr(recipe, field.name)
        wanted = tuple if field.name == "end_ids" else field.type
        if type(value) is not wanted:
            yield f"{field.name} is {value!r}, wanted {getattr(wanted, '__name__', wanted)}"
    if type(recipe.end_ids) is tuple and not all(type(each) is int for each in recipe.end_ids):
        yield f"end_ids is {recipe.end_ids!r}, wanted ids"


def _wrong_values(recipe: RolloutRecipe) -> Iterable[str]:
    # of one field
    for name in ("prompts_digest", "vocabulary_digest", "writer_digest", "writer_numerics"):
        if not getattr(recipe, name):
            yield f"{name} is empty"
    for name in ("num_prompts", "shard_prompts", "samples", "max_new_tokens", "vocab_size"):
        if not 1 <= getattr(recipe, name) <= _MOST_COUNT:
            yield f"{name} is {getattr(recipe, name)}, wanted 1 to {_MOST_COUNT}"
    if recipe.writer_kind not in ("weights", "api"):
        yield f"writer_kind is {recipe.writer_kind!r}, wanted 'weights' or 'api'"
    if not (math.isfinite(recipe.temperature) and recipe.temperature > 0):
        yield f"temperature is {recipe.temperature}, wanted a finite number above 0"
    if not 0 < recipe.top_p <= 1:
        yield f"top_p is {recipe.top_p}, wanted above 0 and at most 1"
    if not 0 <= recipe.top_logprobs <= recipe.vocab_size:
        yield f"top_logprobs is {recipe.top_logprobs}, wanted 0 to {recipe.vocab_size}"

    # of fields together
    if not recipe.max_new_tokens < recipe.sequence_length <= _MOST_COUNT:
        yield (
            f"sequence_length is {recipe.sequence_length}, wanted more than max_new_tokens, which "
            f"is {recipe.max_new_tokens}, and at most {_MOST_COUNT}"
        )
    if recipe.num_prompts > MOST_CHUNKS * recipe.shard_prompts:
        yield f"num_prompts is {recipe.num_prompts}, wanted at most {MOST_CHUNKS} shards"
    if list(recipe.end_ids) != sorted({*recipe.end_ids}) or not all(
        0 <= each < recipe.vocab_size for each in recipe.end_ids
    ):
        yield f"end_ids is {recipe.end_ids}, wanted ascending ids below {recipe.vocab_size}"
