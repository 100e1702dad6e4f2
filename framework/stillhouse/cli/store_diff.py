"""`stillhouse store diff A B`: what differs between two recipes, each given by its place."""

import re
from collections.abc import Iterable

from stillhouse.errors import StoreError
from stillhouse.store import Recipe, differences
from stillhouse.store.maintenance import find_recipes
from stillhouse.store.rollout_maintenance import find_rollouts
from stillhouse.store.rollout_recipe import RolloutRecipe, rollout_differences
from stillhouse.terminal import one_line, say

_PREFIX = re.compile(r"[0-9a-fA-F]{1,64}")


def compare(one: str, other: str) -> bool:
    """Print what differs between the recipes at two places. Returns whether they are equal.

    A place is the URL of a store of one recipe, or a URL, a slash and the first digits of a
    fingerprint. Raises StoreError where it names no recipe, or several, and where one of the two is
    of targets and the other of rollouts.
    """
    first, second = _recipe_at(one), _recipe_at(other)
    if isinstance(first, Recipe) and isinstance(second, Recipe):
        found = differences(first, second)
    elif isinstance(first, RolloutRecipe) and isinstance(second, RolloutRecipe):
        found = rollout_differences(first, second)
    else:
        raise StoreError(
            f"{first.fingerprint[:16]} is of {_kind(first)}, and {second.fingerprint[:16]} of "
            f"{_kind(second)}: they have no field in common; name two of one kind"
        )
    if not found:
        say(f"both are the recipe {first.fingerprint[:16]}")
        return True
    say(f"{first.fingerprint[:16]} against {second.fingerprint[:16]}")
    for difference in found:
        say(f"  - {one_line(difference)}")
    return False


def _recipe_at(place: str) -> Recipe | RolloutRecipe:
    """The recipe that a place names."""
    # a store of one recipe
    recipes = _recipes_in(place)
    if len(recipes) == 1:
        return recipes[0]
    if recipes:
        raise StoreError(
            f"{place} has {len(recipes)} recipes; name one of them as "
            f"{place.rstrip('/')}/FINGERPRINT, by its first digits: {_listed(recipes)}"
        )

    # a store, and the beginning of a fingerprint
    url, slash, prefix = place.rstrip("/").rpartition("/")
    url = (url or slash or ".").removesuffix("/rollouts")
    recipes = _recipes_in(url) if _PREFIX.fullmatch(prefix) else []
    chosen = [recipe for recipe in recipes if recipe.fingerprint.startswith(prefix.lower())]
    if len(chosen) == 1:
        return chosen[0]
    if recipes:
        raise StoreError(
            f"{len(chosen) or 'no'} recipes in {url} begin with {prefix}, wanted one; there are "
            f"{_listed(recipes)}"
        )
    raise StoreError(
        f"there is no recipe in {place}; give the URL of a store, with / and the first digits of "
        "a fingerprint where it has several recipes: `stillhouse store ls` lists them"
    )


def _recipes_in(url: str) -> list[Recipe | RolloutRecipe]:
    return [*find_recipes(url), *(store.recipe for store in find_rollouts(url))]


def _kind(recipe: Recipe | RolloutRecipe) -> str:
    return "targets" if isinstance(recipe, Recipe) else "rollouts"


def _listed(recipes: Iterable[Recipe | RolloutRecipe]) -> str:
    return ", ".join(recipe.fingerprint[:16] for recipe in recipes)
