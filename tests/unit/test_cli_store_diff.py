"""`store diff` tells in words in which choices two recipes differ; its exit code says whether they
do."""

from pathlib import Path

import pytest

from helpers.chunks import small_recipe
from helpers.command import stillhouse
from stillhouse.store import ChunkStore

RECIPE = small_recipe()
OTHER = small_recipe(format=2, k=6, teacher_dtype="bfloat16\x1b[2J")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store of both recipes."""
    url = str(tmp_path / "store")
    for recipe in (RECIPE, OTHER):
        ChunkStore.create(url, recipe)
    return url


def test_two_recipes_of_one_store_are_compared_by_the_first_digits_of_their_fingerprints(
    url: str,
) -> None:
    one, other = RECIPE.fingerprint, OTHER.fingerprint
    outcome = stillhouse("store", "diff", f"{url}/{one[:2].upper()}", f"{url}/{other}")
    assert outcome.code == 1
    assert outcome.out.splitlines() == [
        f"{one[:16]} against {other[:16]}",
        "  - format (the version of the store's format): 1 against 2",
        "  - teacher_dtype (the teacher's number format): 'float32' against 'bfloat16\\x1b[2J'",
        "  - k (exact entries a token): 4 against 6",
    ]


def test_equal_recipes_of_two_stores_are_equal(url: str, tmp_path: Path) -> None:
    ChunkStore.create(str(tmp_path / "copy"), RECIPE)
    outcome = stillhouse("store", "diff", tmp_path / "copy", f"{url}/{RECIPE.fingerprint[:16]}/")
    assert outcome.code == 0
    assert outcome.out == f"both are the recipe {RECIPE.fingerprint[:16]}\n"


def test_a_store_in_the_current_directory_is_named_by_digits_alone(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(url)
    digits = [recipe.fingerprint[:4] for recipe in (RECIPE, OTHER)]
    assert stillhouse("store", "diff", *digits).code == 1


def test_a_place_that_names_no_recipe_or_several_is_refused_with_those_that_are_there(
    url: str,
) -> None:
    for place, words in (
        (url, f"{url} has 2 recipes; name one of them as {url}/FINGERPRINT"),
        (f"{url}/0123", f"no recipes in {url} begin with 0123, wanted one; there are "),
        (f"{url}/absent", f"there is no recipe in {url}/absent; give the URL of a store"),
        ("absent", "there is no recipe in absent; give the URL of a store"),
        ("ftp://host/store", "wanted a directory, or s3://"),
    ):
        outcome = stillhouse("store", "diff", place, f"{url}/{RECIPE.fingerprint}")
        assert outcome.code == 2
        assert words in outcome.err
