"""Where a root keeps what is no chunk: labels, rollouts, verdicts and weights.

Functions of numbers and fingerprints, as docs/format.md has them. Every object there is created
once and never changed.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

from stillhouse.store.object_store import Blobs
from stillhouse.store.recipe import canonical_json

_VERSION = 1


def label_key(fingerprint: str, run: str) -> str:
    """The key of a run's label beside the recipe with this fingerprint."""
    return f"{fingerprint[:16]}/labels/{run}.json"


def rollout_recipe_key(fingerprint: str) -> str:
    """The key of the rules by which rollouts are written."""
    return f"rollouts/{fingerprint[:16]}/recipe.json"


def shard_key(fingerprint: str, number: int) -> str:
    """The key of one block of rollouts."""
    return f"rollouts/{fingerprint[:16]}/shards/{number:010d}.safetensors"


def verdict_key(fingerprint: str, grader: str, number: int) -> str:
    """The key of what a grader, given by its fingerprint, says of one block of rollouts."""
    return f"rollouts/{fingerprint[:16]}/verdicts/{grader[:16]}/{number:010d}.json"


def weights_key(fingerprint: str, number: int) -> str:
    """The key of the manifest of a student's weights after `number` rounds."""
    return f"weights/{fingerprint[:16]}/{number:010d}.json"


def create_label(
    blobs: Blobs, fingerprint: str, *, run: str, names: Mapping[str, str], now: float
) -> bool:
    """Say for people which run a recipe was made for, outside the fingerprint; `now` is in seconds
    since 1970. False if the run has a label already, which stays as it is. Raises StoreError."""
    label = {
        "created": datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "names": dict(names),
        "run": run,
        "version": _VERSION,
    }
    return blobs.create(label_key(fingerprint, run), canonical_json(label))
