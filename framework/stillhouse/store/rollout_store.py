"""The rollouts of one recipe, in a store that many machines share.

<root>/rollouts/<first 16 digits of the fingerprint>/recipe.json
<root>/rollouts/<the same>/shards/0000000012.safetensors      created once, never changed
<root>/rollouts/<the same>/quarantine/       what was found bad, with verdicts on it; never read
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from stillhouse.errors import ChunkError, RecipeError, StoreError
from stillhouse.store.chunk_header import START_BYTES
from stillhouse.store.numbered import NumberedStore
from stillhouse.store.object_store import Blobs
from stillhouse.store.ranges import Extent
from stillhouse.store.rollout_recipe import (
    RolloutRecipe,
    parse_rollout_recipe,
    rollout_differences,
)
from stillhouse.store.rollouts import (
    SET_ASIDE,
    Rollouts,
    checksum_in,
    pack_rollouts,
    unpack_rollouts,
)

_SHARD_KEY = re.compile(r"rollouts/[0-9a-f]{16}/shards/([0-9]{10})\.safetensors")
_REQUESTS = 16  # at the same time


class RolloutsPlace(NamedTuple):
    """A store, and the recipe of some of the rollouts in it."""

    url: str
    fingerprint16: str  # the first digits of the recipe's fingerprint

    @property
    def recipe_key(self) -> str:
        return f"rollouts/{self.fingerprint16}/recipe.json"


@dataclass(frozen=True, slots=True)
class ShardRef:
    """What is reported of a published shard: no tensor."""

    number: int
    num_rollouts: int
    num_tokens: int  # that were sampled
    num_bytes: int
    duplicate: bool  # another publisher's bytes are in the store


class RolloutStore(NumberedStore[RolloutRecipe]):
    """The shards of one recipe under a root. Thread-safe and picklable; making one sends no
    request."""

    noun, _above, _objects, _last_tensor = "shard", "rollouts/", "shards", "loss_mask"

    @property
    def place(self) -> RolloutsPlace:
        return RolloutsPlace(self.url, self.recipe.fingerprint[:16])

    def publish(self, rollouts: Rollouts) -> ShardRef:
        """Pack and put a shard, as `ChunkStore.publish` does a chunk.

        Raises ChunkError on a shard that is not of the recipe, StoreUnavailable if another try may
        help, StoreError if it cannot.
        """
        self._check(rollouts)
        data, number = pack_rollouts(rollouts, self.recipe.fingerprint), rollouts.number
        created = self._put(number, data)
        num_tokens = rollouts.sequences.num_targets
        return ShardRef(number, len(rollouts), num_tokens, len(data), duplicate=not created)

    def fetch(self, number: int) -> Rollouts:
        """A whole shard, verified. Raises ChunkMissing if it is not there yet, ChunkError if two
        requests of two kinds find it bad."""
        fingerprint = self.recipe.fingerprint
        rollouts: Rollouts = self._whole(
            number, lambda data: unpack_rollouts(data, fingerprint, number)
        )
        self._check(rollouts)
        return rollouts

    def verify(self, number: int) -> None:
        """Read a whole shard. Raises ChunkMissing or ChunkError."""
        self.fetch(number)

    def key(self, number: int) -> str:
        """A shard's key under the root. Raises RecipeError on a number that the recipe does not
        have."""
        self.recipe.shard_rows(number)
        return f"{self.folder}/shards/{number:010d}.safetensors"

    def rows(self, number: int) -> range:
        """The prompts of shard `number`. Raises RecipeError as `key` does."""
        return self.recipe.shard_rows(number)

    def digest(self) -> str:
        """Of the bytes of all shards, by the checksums that they carry. Raises StoreError where
        shards are missing, ChunkError where one is damaged."""
        # all there?
        num_missing = self.recipe.num_shards - len(self.published())
        if num_missing:
            raise StoreError(
                f"{num_missing} of {self.recipe.num_shards} shards are not in {self.url}/"
                f"{self.folder}; `stillhouse generate`, given again with the same file, writes them"
            )

        # each by the start of its file
        with ThreadPoolExecutor(_REQUESTS) as threads:
            checksums = threads.map(self.checksum, range(self.recipe.num_shards))
            return xxhash.xxh3_64_hexdigest("".join(checksums).encode())

    def checksum(self, number: int) -> str:
        """Of a shard, as it carries it: one small request. Raises ChunkMissing, ChunkError."""
        return checksum_in(self.read_start(number), self.recipe.fingerprint, number)

    def read_start(self, number: int) -> memoryview:
        """The first bytes of a shard, in which its header ends, unchecked. Raises ChunkMissing."""
        with self._reading(number):
            start, _ = self.blobs.read_start(self.key(number), START_BYTES)
        return start

    def read_extents(self, number: int, extents: Sequence[Extent]) -> list[memoryview]:
        """As `Blobs.read_extents`, of a shard, unchecked. Raises ChunkMissing."""
        with self._reading(number):
            return self.blobs.read_extents(self.key(number), extents)

    def number_of(self, key: str) -> int | None:
        """The number of the shard with this key; None where it is no shard's key."""
        return self._number_of(key)

    def verdict_keys(self, number: int) -> list[str]:
        """The keys of all verdicts on a shard, by a listing."""
        blobs = self.blobs.under(f"{self.folder}/verdicts")
        return [blob.key for blob in blobs if blob.key.endswith(f"/{number:010d}.json")]

    def withdraw(self, *verdict_keys: str) -> None:
        """Move verdicts into quarantine/; one that is gone already is no error."""
        for key in verdict_keys:
            self._move_into_quarantine(key)

    def _move_aside(self, number: int) -> None:
        """A shard's verdicts go with it, and before it: they are on its samples, and must not be
        taken for verdicts on those that are written in its place. A grader may have put one
        meanwhile; from then on it sees that the shard is gone, and withdraws its own."""
        self.withdraw(*self.verdict_keys(number))
        self._move_into_quarantine(self.key(number))
        self.withdraw(*self.verdict_keys(number))

    def _check(self, rollouts: Rollouts) -> None:
        """Raise ChunkError unless these are the rollouts that the recipe wants of the shard."""
        # of the prompts of this block, in their order
        recipe, name = self.recipe, f"shard {rollouts.number}"
        prompts, samples = np.array(self.rows(rollouts.number)), np.arange(recipe.samples)
        if not (
            np.array_equal(rollouts.prompts_S, np.repeat(prompts, recipe.samples))
            and np.array_equal(rollouts.samples_S, np.tile(samples, len(prompts)))
        ):
            raise ChunkError(
                f"{name} has other rollouts than {recipe.samples} of each of the prompts "
                f"{prompts[0]} to {prompts[-1]}, in this order"
            )

        # and with values that the recipe allows
        length = rollouts.sequences.token_ids_SL.shape[1]
        if length != recipe.sequence_length:
            raise ChunkError(
                f"{name} has rollouts of {length} tokens, wanted {recipe.sequence_length}"
            )
        highest = int(rollouts.sequences.token_ids_SL.max())
        if highest >= recipe.vocab_size:
            raise ChunkError(
                f"{name} has the token id {highest}, wanted at most {recipe.vocab_size - 1}"
            )
        self._check_top_logprobs(rollouts)
        if recipe.writer_kind == "weights" and np.isnan(rollouts.sampled_logprobs_SL).any():
            raise ChunkError(f"{name} has log-probabilities that are no number")
        has_none_S = ~rollouts.sequences.loss_mask_SL.any(axis=1)
        if not np.array_equal(has_none_S, rollouts.finish_S == SET_ASIDE):
            raise ChunkError(f"{name} has rollouts without a sampled token that are not set aside")

    def _check_top_logprobs(self, rollouts: Rollouts) -> None:
        """Raise ChunkError unless there are as many entries as the recipe asks for, of its ids."""
        top, recipe, name = rollouts.top, self.recipe, f"shard {rollouts.number}"
        found = 0 if top is None else top.ids_SLK.shape[-1]
        if found != recipe.top_logprobs:
            raise ChunkError(
                f"{name} has top_logprobs of {found} entries, wanted {recipe.top_logprobs}"
            )
        highest = -1 if top is None else int(top.ids_SLK.max())
        if highest >= recipe.vocab_size:
            raise ChunkError(
                f"{name} has the id {highest} in top_ids, wanted at most {recipe.vocab_size - 1}"
            )

    def _number_of(self, key: str) -> int | None:
        match = _SHARD_KEY.fullmatch(key)
        return int(match[1]) if match else None

    def _differences_to(self, key: str) -> list[str]:
        return rollout_differences(self.recipe, _recipe_at(self.blobs, key))

    @property
    def _num_objects(self) -> int:
        return self.recipe.num_shards


def open_rollouts(root: str | Blobs, fingerprint16: str) -> RolloutStore:
    """The rollouts of a recipe that is in a store. Raises RecipeError where there is none, or it is
    damaged."""
    blobs = root if isinstance(root, Blobs) else Blobs(root)
    key = RolloutsPlace(blobs.url, fingerprint16).recipe_key
    try:
        recipe = _recipe_at(blobs, key)
    except FileNotFoundError:
        raise RecipeError(
            f"there are no rollouts {fingerprint16} in {blobs.url}: look at the last words of "
            "`stillhouse generate`, which have the line for a config"
        ) from None
    if recipe.fingerprint[:16] != fingerprint16:
        raise RecipeError(
            f"{blobs.url}/{key} has the fingerprint {recipe.fingerprint[:16]}: it was moved or "
            "edited"
        )
    return RolloutStore(blobs, recipe)


def _recipe_at(blobs: Blobs, key: str) -> RolloutRecipe:
    """The recipe under a key. Raises RecipeError if two requests of two kinds find it bad,
    FileNotFoundError if there is none."""
    where = f"{blobs.url}/{key}"
    try:
        return parse_rollout_recipe(bytes(blobs.read(key)), where=where)
    except RecipeError:  # perhaps damaged on the way alone
        return parse_rollout_recipe(b"".join(blobs.pieces(key)), where=where)
