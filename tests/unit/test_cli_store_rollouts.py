"""Rollouts in a store are shown, verified and compared as chunks are; a shard that is moved aside
takes its verdicts along, and nothing that nobody knows is touched."""

import os
from pathlib import Path

import pytest

from helpers.chunks import make_chunk, small_recipe
from helpers.command import stillhouse
from helpers.rollouts import make_shard, small_rollout_recipe
from stillhouse.store import ChunkStore
from stillhouse.store.grader_names import claim_name
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.verdicts import grader_name, put_verdict, read_verdict, verdict_key

RECIPE = small_rollout_recipe()
FINGERPRINT16 = RECIPE.fingerprint[:16]
FOLDER = f"rollouts/{FINGERPRINT16}"
NUMBER, JUDGE = {"kind": "number"}, {"kind": "judge"}
HOSTILE = "judge \x1b[2J"


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    """Two shards of three; one grader has graded both, and another one of them."""
    store = RolloutStore.create(str(tmp_path / "store"), RECIPE)
    for number in (0, 2):
        store.publish(make_shard(RECIPE, number))
    claim_name(store.blobs, RECIPE.fingerprint, name="number", grader=NUMBER)
    claim_name(store.blobs, RECIPE.fingerprint, name=HOSTILE, grader=JUDGE)
    for grader, number in ((NUMBER, 0), (NUMBER, 2), (JUDGE, 2)):
        give_verdict(store, grader, number)
    return store


def give_verdict(store: RolloutStore, grader: dict[str, str], number: int) -> None:
    scores = [0.5] * len(store.rows(number)) * RECIPE.samples
    put_verdict(store.blobs, RECIPE.fingerprint, number=number, grader=grader, scores=scores)


def path_of(store: RolloutStore, key: str) -> Path:
    return Path(store.url) / key


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def verdict_path(store: RolloutStore, grader: dict[str, str], number: int) -> Path:
    return path_of(store, verdict_key(RECIPE.fingerprint, grader_name(grader), number))


def test_ls_has_a_line_for_each_recipe_of_rollouts_with_shards_and_verdicts(
    store: RolloutStore,
) -> None:
    outcome = stillhouse("store", "ls", store.url)
    assert outcome.code == 0, outcome.err
    heading, line = outcome.out.splitlines()
    assert heading.split() == [
        *("rollouts", "writer", "prompts", "samples", "tokens", "shards", "bytes", "verdicts")
    ]
    assert line.split()[:2] == [FINGERPRINT16, "some-weights"]
    assert "2 of 3" in line
    assert line.rstrip().endswith(r"judge \x1b[2J 1, number 2")


def test_ls_shows_chunks_and_rollouts_of_one_store_and_leaves_out_what_it_does_not_know(
    store: RolloutStore,
) -> None:
    chunks = ChunkStore.create(store.url, small_recipe())
    chunks.publish(make_chunk(small_recipe(), 0))
    for folder in ("notes", "weights/0123456789abcdef", "rollouts/notes", f"{FOLDER}/notes"):
        path_of(store, folder).mkdir(parents=True)
        (path_of(store, folder) / "of mine.txt").write_text("mine")
    first = [line.split()[:1] for line in stillhouse("store", "ls", store.url).out.splitlines()]
    assert first == [
        ["recipe"],
        [small_recipe().fingerprint[:16]],
        [],
        ["rollouts"],
        [FINGERPRINT16],
    ]
    assert stillhouse("store", "stat", store.url).code == 0
    assert stillhouse("store", "sweep", store.url).code == 0
    outcome = stillhouse("store", "verify", store.url)
    assert outcome.code == 0, outcome.out


def test_a_damaged_recipe_is_moved_and_published_again_by_whoever_has_the_same_settings(
    store: RolloutStore,
) -> None:
    flip(path_of(store, store.recipe_key), at=0)
    outcome = stillhouse("store", "verify", store.url, "--quarantine")
    assert "1 recipes were moved to quarantine/" in outcome.err
    RolloutStore.create(store.url, RECIPE)
    assert stillhouse("store", "verify", store.url).code == 0
    assert store.published() == {0, 2}


def test_rollouts_whose_recipe_is_gone_are_named(store: RolloutStore) -> None:
    (path_of(store, FOLDER) / "recipe.json").unlink()
    outcome = stillhouse("store", "verify", store.url, "--quarantine")
    assert outcome.code == 1
    assert f"{FOLDER}/recipe.json: it is missing" in outcome.out
    assert store.published() == {0, 2}
    assert stillhouse("store", "ls", store.url).code == 2


def test_stat_shows_every_field_the_shards_that_are_not_there_and_what_each_grader_has_graded(
    store: RolloutStore,
) -> None:
    outcome = stillhouse("store", "stat", store.url, FINGERPRINT16[:5])
    assert outcome.code == 0, outcome.err
    place, *lines = outcome.out.splitlines()
    assert place == f"{store.url}/{FOLDER}"
    rows = [line.strip().split(maxsplit=1) for line in lines]
    shown = dict(rows)
    assert shown["fingerprint"] == RECIPE.fingerprint
    assert (shown["max_new_tokens"], shown["writer_numerics"]) == ("6", "float32")
    assert shown["shards"] == "2 of 3"
    assert shown["not"].split(maxsplit=1)[1].startswith("1: `stillhouse generate`")
    graders = [value for name, value in rows if name == "grader"]
    assert graders == [r"judge \x1b[2J: 1 of 3 shards", "number: 2 of 3 shards"]
    wrong = stillhouse("store", "stat", store.url, "ffff")
    assert wrong.code == 2
    assert FINGERPRINT16 in wrong.err


def test_verify_reads_every_shard_verdict_and_name(store: RolloutStore) -> None:
    outcome = stillhouse("store", "verify", store.url)
    assert outcome.code == 0, outcome.out
    assert "8 objects" in outcome.out  # a recipe, two shards, three verdicts, two names


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("shards/0000000002.safetensors", "shard 2 is damaged"),
        ("verdicts/*/0000000000.json", "canonical JSON"),
        ("graders/*.json", "not the name of a grader"),
        ("recipe.json", "recipe of rollouts"),
    ],
)
def test_a_flipped_bit_is_named_and_what_it_is_in_stays(
    store: RolloutStore, pattern: str, words: str
) -> None:
    path = next(iter(path_of(store, FOLDER).glob(pattern)))
    flip(path, at=0 if path.suffix == ".json" else -1)
    before = path.read_bytes()
    outcome = stillhouse("store", "verify", store.url)
    assert outcome.code == 1
    assert str(path.relative_to(store.url)) in outcome.out
    assert words in outcome.out
    assert "--quarantine" in outcome.err
    assert path.read_bytes() == before
    for verb in ("ls", "sweep"):
        assert "Traceback" not in stillhouse("store", verb, store.url).err


def test_a_shard_goes_to_quarantine_with_the_verdicts_on_it_and_is_written_anew(
    store: RolloutStore,
) -> None:
    flip(path_of(store, store.key(2)))
    outcome = stillhouse("store", "verify", store.url, "--quarantine")
    assert outcome.code == 1
    assert "1 shards, 2 verdicts were moved to quarantine/" in outcome.err
    assert "with other words perhaps" in outcome.err
    assert stillhouse("store", "verify", store.url).code == 0
    assert store.published() == {0}
    assert not verdict_path(store, NUMBER, 2).exists()
    assert verdict_path(store, NUMBER, 0).exists()

    # what is written in its place has not been graded
    store.publish(make_shard(RECIPE, 2, salt=1))
    for grader in (NUMBER, JUDGE):
        name = grader_name(grader)
        assert (
            read_verdict(store.blobs, RECIPE.fingerprint, number=2, grader=name, num_rollouts=2)
            is None
        )
    swept = stillhouse("store", "sweep", store.url)
    assert "3 objects in quarantine" in swept.out


def test_a_shard_that_a_power_cut_left_short_loses_its_verdicts_when_it_is_written_anew(
    store: RolloutStore,
) -> None:
    path = path_of(store, store.key(2))
    path.write_bytes(path.read_bytes()[:-3])
    assert not store.publish(make_shard(RECIPE, 2, salt=1)).duplicate
    assert not verdict_path(store, JUDGE, 2).exists()
    assert verdict_path(store, NUMBER, 0).exists()


def test_a_verdict_on_a_shard_that_is_not_there_is_found_and_moved(store: RolloutStore) -> None:
    path_of(store, store.key(2)).unlink()
    outcome = stillhouse("store", "verify", store.url, "--quarantine")
    assert outcome.code == 1
    assert "shard 2 is not there" in outcome.out
    assert "2 verdicts were moved to quarantine/" in outcome.err
    assert not verdict_path(store, NUMBER, 2).exists()
    assert stillhouse("store", "verify", store.url).code == 0


def test_a_damaged_verdict_or_name_is_moved_alone_and_can_be_made_anew(
    store: RolloutStore,
) -> None:
    flip(verdict_path(store, NUMBER, 0), at=0)
    for path in path_of(store, f"{FOLDER}/graders").iterdir():
        path.write_bytes(b"")
    outcome = stillhouse("store", "verify", store.url, "--quarantine")
    assert "1 verdicts, 2 names of graders were moved" in outcome.err
    assert stillhouse("store", "verify", store.url).code == 0
    assert store.published() == {0, 2}
    give_verdict(store, NUMBER, 0)
    claim_name(store.blobs, RECIPE.fingerprint, name="number", grader=NUMBER)
    assert stillhouse("store", "verify", store.url).code == 0


def test_what_is_never_read_is_named_and_never_moved(store: RolloutStore) -> None:
    strays = ("shards/notes.txt", "verdicts/notes.txt", "verdicts/0123456789abcdef/7.json")
    for name in strays:
        path = path_of(store, f"{FOLDER}/{name}")
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    outcome = stillhouse("store", "verify", store.url, "--quarantine")
    assert outcome.code == 1
    assert "nothing of the rollouts was moved" in outcome.err
    for name in strays:
        assert f"{FOLDER}/{name}: this is not the name of a" in outcome.out
        assert path_of(store, f"{FOLDER}/{name}").exists()


def test_sweep_removes_old_leftovers_of_writers(store: RolloutStore) -> None:
    path = path_of(store, f"{FOLDER}/shards/0000000001.safetensors#1")
    path.write_bytes(b"half a shard")
    os.utime(path, (0, 0))
    outcome = stillhouse("store", "sweep", store.url)
    assert "1 leftovers removed" in outcome.out
    assert not path.exists()


def test_diff_compares_rollouts_and_refuses_to_compare_them_with_targets(
    store: RolloutStore, tmp_path: Path
) -> None:
    other = small_rollout_recipe(samples=3, temperature=0.5)
    RolloutStore.create(str(tmp_path / "other"), other)
    outcome = stillhouse(
        "store", "diff", f"{store.url}/{FOLDER}", f"{tmp_path}/other/{other.fingerprint[:4]}"
    )
    assert outcome.code == 1
    assert outcome.out.splitlines() == [
        f"{FINGERPRINT16} against {other.fingerprint[:16]}",
        "  - samples: 2 against 3",
        "  - temperature: 1.0 against 0.5",
    ]
    assert stillhouse("store", "diff", store.url, store.url).code == 0
    ChunkStore.create(str(tmp_path / "targets"), small_recipe())
    mixed = stillhouse("store", "diff", store.url, str(tmp_path / "targets"))
    assert mixed.code == 2
    assert "is of rollouts, and" in mixed.err
