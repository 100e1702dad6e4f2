"""What lies in a store is shown in full; damage is named, moved aside on request, and never taken
for health."""

import os
from pathlib import Path

import pytest

from helpers.bounded import bounded, measured_memory
from helpers.chunks import make_chunk, small_recipe
from helpers.command import config_of, stillhouse
from helpers.damage import read_only
from helpers.world import TinyWorld
from stillhouse.store import ChunkStore

RECIPE = small_recipe()
OTHER = small_recipe(k=6)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Two chunks of three of one recipe, none of another."""
    url = str(tmp_path / "store")
    store = ChunkStore.create(url, RECIPE)
    for number in (0, 2):
        store.publish(make_chunk(RECIPE, number))
    ChunkStore.create(url, OTHER)
    return url


@pytest.fixture
def damaged(url: str) -> str:
    path = Path(url) / ChunkStore(url, RECIPE).key(2)
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    return url


def test_ls_has_a_line_for_each_recipe_with_chunks_present_and_bytes(url: str) -> None:
    outcome = stillhouse("store", "ls", url)
    assert outcome.code == 0
    lines = {line.split()[0]: line for line in outcome.out.splitlines()[1:]}
    assert set(lines) == {RECIPE.fingerprint[:16], OTHER.fingerprint[:16]}
    assert "2 of 3" in lines[RECIPE.fingerprint[:16]]
    assert "10 x 12" in lines[RECIPE.fingerprint[:16]]
    assert "0 of 3" in lines[OTHER.fingerprint[:16]]


def test_stat_shows_every_field_and_the_chunks_that_are_not_there(url: str) -> None:
    outcome = stillhouse("store", "stat", url, RECIPE.fingerprint[:6])
    shown = dict(line.strip().split(maxsplit=1) for line in outcome.out.splitlines()[1:])
    assert shown["fingerprint"] == RECIPE.fingerprint
    for name in (
        "corpus_digest",
        "num_sequences",
        "tokenizer_digest",
        "teacher_digest",
        "teacher_dtype",
        "k",
        "temperature",
        "value_bits",
    ):
        assert shown[name] == str(getattr(RECIPE, name))
    assert "not there         1: not made yet" in outcome.out
    assert "damaged           none known" in outcome.out
    assert "chunks            2 of 3\n" in outcome.out


def test_stat_without_a_fingerprint_shows_all_and_a_wrong_one_names_them(url: str) -> None:
    outcome = stillhouse("store", "stat", url)
    assert RECIPE.fingerprint in outcome.out
    assert OTHER.fingerprint in outcome.out
    wrong = stillhouse("store", "stat", url, "zz")
    assert wrong.code == 2
    assert RECIPE.fingerprint[:16] in wrong.err


def test_stat_of_a_store_of_which_a_part_was_needed_does_not_speak_of_damage(
    tmp_path: Path,
) -> None:
    recipe = small_recipe(num_sequences=377 * 4)
    store = ChunkStore.create(str(tmp_path), recipe)
    for number in range(0, 24, 2):
        store.publish(make_chunk(recipe, number))
    outcome = stillhouse("store", "stat", store.url)
    assert "chunks            12 of 377\n" in outcome.out
    first = "1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23-376"
    assert (
        f"not there         {first}: not made yet, never needed, or deleted once read\n"
        in outcome.out
    )
    assert (
        "damaged           none known: `stillhouse store verify` reads every byte\n" in outcome.out
    )
    assert "missing" not in outcome.out


def test_stat_tells_damaged_chunks_from_those_that_were_never_made(url: str) -> None:
    store = ChunkStore(url, RECIPE)
    path = Path(url) / store.key(0)
    path.write_bytes(path.read_bytes()[:-1])
    assert not store.quarantine(2)
    assert (
        "damaged           0: `--repair RUN_DIR`"
        in stillhouse("store", "stat", url, RECIPE.fingerprint[:6]).out
    )
    assert store.quarantine(0)
    outcome = stillhouse("store", "stat", url, RECIPE.fingerprint[:6])
    assert "damaged           0: `--repair RUN_DIR`" in outcome.out
    assert "not there         1: not made yet" in outcome.out
    store.publish(make_chunk(RECIPE, 0))
    assert (
        "damaged           none known"
        in stillhouse("store", "stat", url, RECIPE.fingerprint[:6]).out
    )


def test_stat_needs_memory_for_what_is_there_alone(tmp_path: Path) -> None:
    """A recipe can have ten billion chunks; two million would be seen."""
    recipe = small_recipe(num_sequences=4 * 2_000_000)
    store = ChunkStore.create(str(tmp_path), recipe)
    store.publish(make_chunk(recipe, 7))
    with measured_memory():
        outcome = bounded(lambda: stillhouse("store", "stat", store.url), num_bytes=0)
    assert outcome is not None
    assert "not there         0-6, 8-1999999: not made yet" in outcome.out


def test_verify_says_when_all_is_well(url: str) -> None:
    outcome = stillhouse("store", "verify", url)
    assert outcome.code == 0
    assert "4 objects" in outcome.out


def test_verify_names_a_damaged_chunk_and_leaves_it(damaged: str) -> None:
    outcome = stillhouse("store", "verify", damaged)
    assert outcome.code == 1
    assert "0000000002.safetensors" in outcome.out
    assert "0000000000.safetensors" not in outcome.out
    assert "--repair RUN_DIR" in outcome.err
    assert ChunkStore(damaged, RECIPE).published() == {0, 2}


def test_quarantine_moves_damaged_chunks_so_that_they_are_made_again(damaged: str) -> None:
    outcome = stillhouse("store", "verify", damaged, "--quarantine")
    assert outcome.code == 1
    assert "1 chunks were moved" in outcome.err
    assert ChunkStore(damaged, RECIPE).published() == {0}
    assert stillhouse("store", "verify", damaged).code == 0
    assert "0000000002" in stillhouse("store", "sweep", damaged).out


def test_verify_names_a_damaged_recipe(url: str) -> None:
    (Path(url) / OTHER.fingerprint[:16] / "recipe.json").write_text("{}")
    outcome = stillhouse("store", "verify", url, "--quarantine")
    assert outcome.code == 1
    assert f"{OTHER.fingerprint[:16]}/recipe.json" in outcome.out


def test_a_store_of_format_1_is_repaired_by_a_config_whose_store_is_elsewhere(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """The config's own store does not exist, so that a run of it would begin in format 2."""
    plan = tiny_world.plan(tmp_path / "run", store={"url": str(tmp_path / "elsewhere")})
    earlier = plan.recipe.in_format_1()
    assert earlier is not None
    store = ChunkStore.create(str(tmp_path / "store"), earlier)
    store.publish(make_chunk(earlier))
    outcome = stillhouse(
        "store", "verify", store.url, "--repair", config_of(plan), cache=tiny_world.folder
    )
    assert outcome.code == 0, outcome
    assert f"all 1 in {store.url}/{store.folder} are good" in outcome.out


def test_sweep_removes_old_leftovers_only(url: str) -> None:
    chunks = Path(url) / RECIPE.fingerprint[:16] / "chunks"
    old, young = chunks / "0000000001.safetensors#1", chunks / "0000000001.safetensors#2"
    for path in (old, young):
        path.write_bytes(b"half a chunk")
    two_days_ago = path.stat().st_mtime - 2 * 86_400
    os.utime(old, (two_days_ago, two_days_ago))
    outcome = stillhouse("store", "sweep", url)
    assert outcome.code == 0
    assert "1 leftovers removed" in outcome.out
    assert (old.exists(), young.exists()) == (False, True)
    assert ChunkStore(url, RECIPE).published() == {0, 2}


def test_a_store_that_may_only_be_read_is_shown_and_verified_and_swept_with_a_refusal_in_words(
    url: str, tmp_path: Path
) -> None:
    (Path(url) / RECIPE.fingerprint[:16] / "chunks" / "0000000001.safetensors#1").touch()
    with read_only(Path(url), at=tmp_path / "seen") as seen:
        assert [stillhouse("store", verb, seen).code for verb in ("ls", "stat", "verify")] == [
            0,
            0,
            0,
        ]
        outcome = stillhouse("store", "sweep", seen, "--older-than-hours", "0")
    assert outcome.code == 2
    assert (
        f"cannot remove {RECIPE.fingerprint[:16]}/0000000001.safetensors#1 in {seen}: permission "
        "denied" in outcome.err
    )


@pytest.mark.parametrize("verb", ["ls", "stat", "verify"])
def test_a_mistyped_url_is_no_empty_store(verb: str, tmp_path: Path) -> None:
    outcome = stillhouse("store", verb, str(tmp_path / "absent"))
    assert outcome.code == 2
    assert "there is no recipe in" in outcome.err
    assert not (tmp_path / "absent").exists()
