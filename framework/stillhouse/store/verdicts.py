"""Verdicts: the scores that a grader gave the rollouts of one shard. A grader more costs no
generation, and changes no verdict of another.

<root>/rollouts/<first 16 digits of the fingerprint>/verdicts/<grader>/<number>.json
                                                                    created once, never changed
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stillhouse.errors import ChunkError
from stillhouse.store.explain import NotAFileError
from stillhouse.store.object_store import Blobs
from stillhouse.store.recipe import canonical_json
from stillhouse.store.rollout_store import RolloutStore

VERDICT_VERSION = 1

_NAME_DIGITS = 16
_KEYS = {"grader", "scores", "version"}
_MOST = sys.float_info.max
_NUMBER = re.compile(r"/([0-9]{10})\.json")
_KEY = re.compile(r"rollouts/[0-9a-f]{16}/verdicts/([0-9a-f]{16})/([0-9]{10})\.json")
_REQUESTS = 16  # at the same time


def grader_name(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits, another one for every other identity of a grader."""
    return _digest({**identity})


def put_verdict(
    blobs: Blobs,
    rollouts: str,
    *,
    number: int,
    grader: Mapping[str, Any],
    scores: Sequence[float],
) -> bool:
    """Create the verdict of a grader, by its identity, on shard `number`. False if there is one,
    which stays.

    `rollouts` is the fingerprint of the rollouts' recipe; `scores` are from 0 to 1, one a rollout.
    """
    assert all(0.0 <= score <= 1.0 for score in scores), "a score is from 0 to 1"
    values = {"grader": {**grader}, "scores": [*map(float, scores)], "version": VERDICT_VERSION}
    return blobs.create(verdict_key(rollouts, grader_name(grader), number), canonical_json(values))


def read_verdict(
    blobs: Blobs, rollouts: str, *, number: int, grader: str, num_rollouts: int
) -> tuple[float, ...] | None:
    """The scores by the grader of this name; None where it has not graded the shard yet.

    Raises ChunkError where the object is not one that the page of the format allows in this place.
    """
    key = verdict_key(rollouts, grader, number)
    try:
        data = bytes(blobs.read(key))
        return _parsed(data, grader=grader, num_rollouts=num_rollouts)
    except FileNotFoundError:
        return None
    except (NotAFileError, _Bad) as error:
        raise ChunkError(
            f"{blobs.url}/{key} is damaged: {error}; delete it, and the shard is graded again"
        ) from None


def verdicts_of(
    store: RolloutStore, grader: str, numbers: Iterable[int]
) -> list[tuple[float, ...] | None]:
    """The scores of each of these shards by the grader of this name, as `read_verdict` has them."""

    def verdict(number: int) -> tuple[float, ...] | None:
        return read_verdict(
            store.blobs,
            store.recipe.fingerprint,
            number=number,
            grader=grader,
            num_rollouts=len(store.rows(number)) * store.recipe.samples,
        )

    with ThreadPoolExecutor(_REQUESTS) as threads:
        return [*threads.map(verdict, numbers)]


def graded_shards(store: RolloutStore, grader: str) -> set[int]:
    """The shards on which the grader of this name has given a verdict, by a listing."""
    folder = verdict_key(store.recipe.fingerprint, grader, 0).rpartition("/")[0]
    keys = [blob.key.removeprefix(folder) for blob in store.blobs.under(folder)]
    return {int(match[1]) for key in keys if (match := _NUMBER.fullmatch(key))}


def verdict_key(rollouts: str, grader: str, number: int) -> str:
    """A verdict's key under the root."""
    return f"rollouts/{rollouts[:_NAME_DIGITS]}/verdicts/{grader}/{number:010d}.json"


def grader_and_number(key: str) -> tuple[str, int] | None:
    """Of a verdict's key: the 16 digits of the grader, and the shard's number. None where it is no
    verdict's key."""
    match = _KEY.fullmatch(key)
    return (match[1], int(match[2])) if match else None


class _Bad(ValueError):
    """These bytes are no verdict of their place."""


def _parsed(data: bytes, *, grader: str, num_rollouts: int) -> tuple[float, ...]:
    # canonical JSON of this version
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or canonical_json(values) != data:
            raise _Bad("it is not canonical JSON of an object")
    except (ValueError, RecursionError) as error:
        raise _Bad(f"it is not canonical JSON ({str(error)[:100]})") from None
    version, identity, scores = (values.get(key) for key in ("version", "grader", "scores"))
    if values.keys() != _KEYS or type(version) is not int or version != VERDICT_VERSION:
        raise _Bad(f"it has not the keys {', '.join(sorted(_KEYS))}, with version 1")
    # of this grader and shard
    if _digest(identity) != grader:
        raise _Bad(f"its grader is another than {grader}")
    if not isinstance(scores, list) or len(scores) != num_rollouts:
        raise _Bad(f"it has not a list of {num_rollouts} scores, one for each rollout")
    if not all(type(score) in (int, float) and abs(score) <= _MOST for score in scores):
        raise _Bad("it has a score that is no number")
    return tuple(map(float, scores))


def _digest(values: Any) -> str:
    return hashlib.sha256(canonical_json(values)).hexdigest()[:_NAME_DIGITS]
