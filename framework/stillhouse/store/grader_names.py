"""Names of graders: what a config calls a grader whose verdicts are on the rollouts of a recipe. A
name stands for one grader for ever, so a rule that names it always means the same scores.

<root>/rollouts/<first 16 digits of the fingerprint>/graders/<name>.json
                                                                    created once, never changed
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from stillhouse.errors import ChunkError, ConfigError
from stillhouse.store.explain import NotAFileError
from stillhouse.store.object_store import Blobs
from stillhouse.store.recipe import canonical_json
from stillhouse.store.verdicts import grader_name

_VERSION = 1
_NAME_DIGITS = 16
_KEYS = {"grader", "name", "version"}


def claim_name(blobs: Blobs, rollouts: str, *, name: str, grader: Mapping[str, Any]) -> None:
    """Make a name stand for the grader of this identity, unless it does already. `rollouts` is the
    fingerprint of the rollouts' recipe.

    Raises ConfigError where it stands for another grader, ChunkError where its object is damaged.
    """
    key = _key(rollouts, name)
    values = {"grader": {**grader}, "name": name, "version": _VERSION}
    if blobs.create(key, canonical_json(values)):
        return
    found = _read(blobs, key)["grader"]
    if found != grader:
        changed = [
            f"{each}: {found.get(each)!r} against {grader.get(each)!r}"
            for each in sorted({*found, *grader})
            if found.get(each) != grader.get(each)
        ]
        raise ConfigError(
            f"these rollouts know another grader by the name {name!r} ({'; '.join(changed)}), and "
            "its verdicts stay; set it back, or give this one a `name` of its own in [[graders]]"
        )


def named_graders(blobs: Blobs, rollouts: str) -> dict[str, str]:
    """The graders that have a name for these rollouts: the 16 digits of each by its name, sorted.
    Raises ChunkError where an object is damaged."""
    folder = f"rollouts/{rollouts[:_NAME_DIGITS]}/graders"
    found = [_read(blobs, blob.key) for blob in blobs.under(folder)]
    return {each["name"]: grader_name(each["grader"]) for each in sorted(found, key=_name_of)}


def check_name(blobs: Blobs, key: str) -> None:
    """Raise ChunkError where an object is not the name of a grader in its place."""
    _read(blobs, key)


def _name_of(values: Mapping[str, Any]) -> str:
    return str(values["name"])


def _key(rollouts: str, name: str) -> str:
    digest = hashlib.sha256(canonical_json({"name": name})).hexdigest()[:_NAME_DIGITS]
    return f"rollouts/{rollouts[:_NAME_DIGITS]}/graders/{digest}.json"


def _read(blobs: Blobs, key: str) -> dict[str, Any]:
    """The values of a name's object. Raises ChunkError where it is not one of its place."""
    try:
        data = bytes(blobs.read(key))
        values = json.loads(data)
        is_one = (
            isinstance(values, dict)
            and values.keys() == _KEYS
            and values["version"] == _VERSION
            and isinstance(values["name"], str)
            and isinstance(values["grader"], dict)
            and canonical_json(values) == data
            and key == _key(key.split("/")[1], values["name"])
        )
    except (NotAFileError, ValueError, RecursionError):
        is_one = False
    if not is_one:
        raise ChunkError(
            f"{blobs.url}/{key} is damaged: it is not the name of a grader; delete it, and "
            "`stillhouse grade` makes it again"
        )
    found: dict[str, Any] = values
    return found
