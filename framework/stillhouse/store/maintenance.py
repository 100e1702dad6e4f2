"""Maintenance of a whole store: list its recipes, verify every object, remove the leftovers of
killed writers."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from stillhouse.errors import ChunkError, RecipeError
from stillhouse.store.chunk_store import ChunkStore, number_of, recipe_at
from stillhouse.store.explain import explained
from stillhouse.store.finding import Finding
from stillhouse.store.numbered import ChunkMissing
from stillhouse.store.object_store import Blobs
from stillhouse.store.recipe import Recipe
from stillhouse.store.rollout_maintenance import rollout_folders, verify_rollouts

_FINGERPRINT16 = re.compile(r"[0-9a-f]{16}")
_STAGING_FILE = re.compile(r".+#\d+")  # what a killed writer leaves in a directory


class StoredRecipe(NamedTuple):
    """A recipe in a store, and how much of it is there."""

    fingerprint16: str
    recipe: Recipe
    num_chunks: int
    num_bytes: int


class Swept(NamedTuple):
    """What `sweep` did and saw."""

    removed: list[str]  # leftovers of killed writers, as paths
    quarantined: list[str]  # keys, for a person to look at


def list_recipes(url: str) -> list[StoredRecipe]:
    """Every recipe under a root, with the number and bytes of its chunks. An unreadable recipe is
    left out: `verify_store` names it."""
    blobs, found = Blobs(url), []
    for recipe in find_recipes(url):
        folder = recipe.fingerprint[:16]
        objects = blobs.under(f"{folder}/chunks")
        sizes = [
            blob.num_bytes for blob in objects if number_of(blob.key, recipe.format) is not None
        ]
        found.append(StoredRecipe(folder, recipe, len(sizes), sum(sizes)))
    return found


def find_recipes(url: str) -> list[Recipe]:
    """Every recipe under a root, as `list_recipes`, without a look at the chunks."""
    blobs, found = Blobs(url), []
    for folder in _recipe_folders(blobs):
        with suppress(RecipeError):
            found.append(_recipe_in(blobs, folder))
    return found


def verify_store(url: str) -> Iterator[Finding]:
    """Read all chunks and all rollouts under a root: a finding for each object. Changes nothing."""
    blobs = Blobs(url)
    for folder in _recipe_folders(blobs):
        key = f"{folder}/recipe.json"
        try:
            store = ChunkStore(blobs, _recipe_in(blobs, folder))
        except RecipeError as error:
            yield Finding(key, None, str(error))
            continue
        yield Finding(key, None, None)
        yield from verify_chunks(store)
    yield from verify_rollouts(blobs)


def verify_chunks(store: ChunkStore) -> Iterator[Finding]:
    """Read every chunk of a recipe: a finding for each object among them. Changes nothing."""
    for blob in store.blobs.under(f"{store.folder}/chunks"):
        number = number_of(blob.key, store.recipe.format)
        yield Finding(blob.key, number, _problem_with(store, number))


def sweep(url: str, *, older_than_s: float, now: float) -> Swept:
    """Remove what killed writers left in a local store, and list the quarantine.

    A leftover is removed once it is `older_than_s` at `now` (seconds since 1970): a younger one may
    belong to a writer that is still at work.
    """
    blobs = Blobs(url)
    folders, removed = [*_recipe_folders(blobs), *rollout_folders(blobs)], []
    for path in _staging_files(blobs, folders):
        doing = f"remove {path.relative_to(blobs.url).parts[0]}/{path.name}"
        # it is gone where its writer is at work, and has just given it its name
        with suppress(FileNotFoundError), explained(doing, url=blobs.url):
            if path.stat().st_mtime <= now - older_than_s:
                path.unlink()
                removed.append(str(path))
    quarantined = [blob.key for folder in folders for blob in blobs.under(f"{folder}/quarantine")]
    return Swept(removed, quarantined)


def _recipe_folders(blobs: Blobs) -> list[str]:
    return [folder for folder in blobs.folders() if _FINGERPRINT16.fullmatch(folder)]


def _recipe_in(blobs: Blobs, folder: str) -> Recipe:
    where = f"{blobs.url}/{folder}/recipe.json"
    try:
        recipe = recipe_at(blobs, f"{folder}/recipe.json")
    except FileNotFoundError:
        raise RecipeError(f"{where} is missing, so it is unknown what its chunks are of") from None
    if recipe.fingerprint[:16] != folder:
        raise RecipeError(
            f"{where} has the fingerprint {recipe.fingerprint[:16]}, its directory is named "
            f"{folder}: it was moved or edited"
        )
    return recipe


def _problem_with(store: ChunkStore, number: int | None) -> str | None:
    if number is None:
        return "this is not the name of a chunk, so it is never read"
    try:
        store.verify(number)
    except (ChunkError, RecipeError, ChunkMissing) as error:
        return str(error)
    return None


def _staging_files(blobs: Blobs, folders: list[str]) -> list[Path]:
    """In a bucket there are none: an object that is not whole is not listed."""
    if blobs.directory is None:
        return []
    paths = [path for folder in folders for path in (blobs.directory / folder).rglob("*#*")]
    return sorted(path for path in paths if _STAGING_FILE.fullmatch(path.name) and path.is_file())
