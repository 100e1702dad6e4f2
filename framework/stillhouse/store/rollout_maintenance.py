"""Maintenance of the rollouts in a store: list their recipes, verify every shard, every verdict and
every name of a grader, and move what is damaged aside."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from stillhouse.errors import ChunkError, RecipeError
from stillhouse.store.finding import Finding
from stillhouse.store.grader_names import check_name, named_graders
from stillhouse.store.numbered import ChunkMissing, quarantine_key
from stillhouse.store.object_store import Blobs
from stillhouse.store.rollout_store import RolloutStore, open_rollouts
from stillhouse.store.verdicts import grader_and_number, read_verdict

_FINGERPRINT16 = re.compile(r"[0-9a-f]{16}")


class StoredRollouts(NamedTuple):
    """The rollouts of a recipe, and how much of them is there."""

    store: RolloutStore
    num_shards: int
    num_bytes: int  # of the shards
    verdicts: Mapping[str, int]  # how many there are, by the 16 digits of their grader
    names: Mapping[str, str]  # the graders' digits by their names; those that are damaged left out

    @property
    def num_objects(self) -> int:
        return 1 + self.num_shards + self.verdicts_in_all + len(self.names)

    @property
    def verdicts_in_all(self) -> int:
        return sum(self.verdicts.values())

    @property
    def verdicts_by_name(self) -> dict[str, int]:
        """How many verdicts each grader has given; one without a name goes by its digits."""
        named = {name: self.verdicts.get(digits, 0) for name, digits in self.names.items()}
        others = {
            digits: count
            for digits, count in sorted(self.verdicts.items())
            if digits not in self.names.values()
        }
        return named | others


def rollout_folders(blobs: Blobs) -> list[str]:
    """The folders of recipes of rollouts under a root; other folders are nobody's here."""
    return [
        folder
        for folder in blobs.folders("rollouts")
        if _FINGERPRINT16.fullmatch(folder.removeprefix("rollouts/"))
    ]


def is_begun(store: RolloutStore) -> bool:
    """Whether anything of these rollouts is there. A directory that is not there is not made to
    look."""
    return store.folder in rollout_folders(store.blobs)


def find_rollouts(url: str) -> list[RolloutStore]:
    """The rollouts of each recipe under a root. One whose recipe cannot be read is left out:
    `verify_rollouts` names it."""
    blobs, found = Blobs(url), []
    for folder in rollout_folders(blobs):
        with suppress(RecipeError):
            found.append(open_rollouts(blobs, folder.removeprefix("rollouts/")))
    return found


def list_rollouts(url: str) -> list[StoredRollouts]:
    """As `find_rollouts`, with the number of shards, their bytes, and the verdicts on them."""
    return [_counted(store) for store in find_rollouts(url)]


def verify_rollouts(blobs: Blobs) -> Iterator[Finding]:
    """Read all rollouts under a root: a finding for each object. Changes nothing."""
    for folder in rollout_folders(blobs):
        key = f"{folder}/recipe.json"
        try:
            store = open_rollouts(blobs, folder.removeprefix("rollouts/"))
        except RecipeError as error:
            missing = (
                "it is missing, so it is unknown what its shards are of; `stillhouse generate`, "
                "given their file, publishes it anew"
            )
            yield Finding(key, None, missing if blobs.stat(key) is None else str(error))
            continue
        yield Finding(key, None, None)
        for part in ("shards", "verdicts", "graders"):
            for blob in blobs.under(f"{folder}/{part}"):
                number = store.number_of(blob.key)
                yield Finding(blob.key, number, _problem_with(store, blob.key))


def quarantine_rollouts(url: str, finding: Finding) -> list[str]:
    """Move what a finding names aside, unless it is good after all, or never read. Returns the keys
    that were moved: with a shard the verdicts on it."""
    # a recipe: whoever has the same settings publishes the same again
    blobs, folder = Blobs(url), "/".join(finding.key.split("/")[:2])
    try:
        store = open_rollouts(blobs, folder.removeprefix("rollouts/"))
    except RecipeError:
        return _moved(blobs, folder, f"{folder}/recipe.json")

    # a shard, unless the recipe has no such number
    if finding.number is not None:
        with suppress(RecipeError):
            verdicts = store.verdict_keys(finding.number)
            return [finding.key, *verdicts] if store.quarantine(finding.number) else []

    # a verdict, or the name of a grader
    is_verdict = grader_and_number(finding.key) is not None
    is_read = is_verdict or finding.key.startswith(f"{folder}/graders/")
    if not is_read or _problem_with(store, finding.key) is None:
        return []
    return _moved(blobs, folder, finding.key)


def _moved(blobs: Blobs, folder: str, key: str) -> list[str]:
    blob = blobs.stat(key)
    if blob is None:
        return []
    blobs.move(key, quarantine_key(folder, blob))
    return [key]


def _counted(store: RolloutStore) -> StoredRollouts:
    shards = [
        blob.num_bytes
        for blob in store.blobs.under(f"{store.folder}/shards")
        if store.number_of(blob.key) is not None
    ]
    verdicts = Counter(
        place[0]
        for blob in store.blobs.under(f"{store.folder}/verdicts")
        if (place := grader_and_number(blob.key)) is not None
    )
    names: dict[str, str] = {}
    with suppress(ChunkError):
        names = named_graders(store.blobs, store.recipe.fingerprint)
    return StoredRollouts(store, len(shards), sum(shards), verdicts, names)


def _problem_with(store: RolloutStore, key: str) -> str | None:
    """What is wrong with a shard, a verdict or a name of a grader; None where nothing is."""
    part = key.removeprefix(f"{store.folder}/").partition("/")[0]
    try:
        if part == "graders":
            check_name(store.blobs, key)
        elif part == "verdicts":
            return _problem_with_verdict(store, key)
        elif (number := store.number_of(key)) is None:
            return "this is not the name of a shard, so it is never read"
        else:
            store.verify(number)
    except (ChunkError, RecipeError, ChunkMissing) as error:
        return str(error)
    return None


def _problem_with_verdict(store: RolloutStore, key: str) -> str | None:
    place = grader_and_number(key)
    if place is None:
        return "this is not the name of a verdict, so it is never read"
    grader, number = place
    read_verdict(
        store.blobs,
        store.recipe.fingerprint,
        number=number,
        grader=grader,
        num_rollouts=len(store.rows(number)) * store.recipe.samples,
    )
    if not store.exists(number):
        return (
            f"shard {number} is not there: the shard that is written in its place would be taken "
            "for graded"
        )
    return None
