"""Shards of rollouts: their bytes are those of docs/format.md, whatever is wrong with one is found,
and what is published stays."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from helpers.pagereader import Refused
from helpers.placereader import read_shard
from helpers.rollouts import make_shard, small_rollout_recipe
from stillhouse.errors import ChunkError, RecipeError, StoreError
from stillhouse.sequence import Sequences
from stillhouse.store import ChunkMissing
from stillhouse.store.object_store import Blobs
from stillhouse.store.rollout_recipe import (
    RolloutRecipe,
    parse_rollout_recipe,
    rollout_differences,
)
from stillhouse.store.rollout_store import RolloutStore, open_rollouts
from stillhouse.store.rollouts import CUT, ENDED, Rollouts, pack_rollouts, unpack_rollouts
from stillhouse.store.verdicts import put_verdict

PLACES = Path(__file__).parents[1] / "golden" / "places" / "rollouts"
(GOLDEN,) = PLACES.rglob("*.safetensors")
FINGERPRINT = "776d667965c2f678"  # and more digits, which the file has
RECIPE = small_rollout_recipe()


def fingerprint() -> str:
    data = GOLDEN.read_bytes()
    start = data.index(FINGERPRINT.encode())
    return data[start : start + 64].decode()


def golden() -> Rollouts:
    return unpack_rollouts(GOLDEN.read_bytes(), fingerprint(), 3)


def path_of(store: RolloutStore, number: int) -> Path:
    return Path(store.url) / store.key(number)


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    return RolloutStore.create(str(tmp_path), RECIPE)


def test_stillhouse_reads_the_golden_shard_and_writes_its_bytes() -> None:
    found = golden()
    assert found.prompts_S.tolist() == [7, 7]
    assert found.samples_S.tolist() == [0, 1]
    assert found.weights_version_S.tolist() == [120, 120]
    assert found.finish_S.tolist() == [0, 1]
    assert found.sequences.token_ids_SL[0].tolist() == [11, 12, 30, 2, 0, 0]
    assert found.sequences.num_targets == 6
    assert found.sampled_logprobs_SL[1].tolist() == [0.0, -1.5, -0.125, -2.0, -0.75, 0.0]
    assert pack_rollouts(found, fingerprint()) == GOLDEN.read_bytes()


def test_what_stillhouse_writes_is_read_by_a_reader_written_from_the_page() -> None:
    shard = make_shard(RECIPE, 1)
    found = read_shard(pack_rollouts(shard, RECIPE.fingerprint), RECIPE.fingerprint, 1)
    for name, array in shard.tensors.items():
        np.testing.assert_array_equal(found[name], array)


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    data = GOLDEN.read_bytes()
    wanted = fingerprint()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        for bad in (bytes(damaged), data[:place]):
            with pytest.raises(ChunkError, match="shard 3"):
                unpack_rollouts(bad, wanted, 3)


@pytest.mark.parametrize(("other", "number"), [(fingerprint(), 4), ("0" * 64, 3)])
def test_a_shard_in_anothers_place_is_refused(other: str, number: int) -> None:
    with pytest.raises(ChunkError, match="damaged, or moved"):
        unpack_rollouts(GOLDEN.read_bytes(), other, number)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("prompts", (0,), -1),
        ("samples", (0,), -1),
        ("weights_version", (1,), -2),
        ("sampled_logprobs", (0, 1), 0.5),
        ("sampled_logprobs", (0, 1), -np.inf),
        ("sampled_logprobs", (0, 0), -0.5),
        ("sampled_logprobs", (0, 0), np.nan),
        ("positions", (0, 0), 1),
        ("positions", (0, 2), 5),
        ("token_ids", (0, 0), -1),
        ("finish", (0,), 3),
        ("loss_mask", (0, 1), 2),
        ("loss_mask", (1, 5), 1),
    ],
)
def test_values_that_the_page_does_not_have_are_never_written(
    name: str, place: tuple[int, ...], value: float
) -> None:
    arrays: dict[str, Any] = {name: each.copy() for name, each in golden().tensors.items()}
    arrays[name][place] = value
    changed = Rollouts(
        3,
        Sequences(arrays["token_ids"], arrays["positions"], arrays["loss_mask"]),
        *(arrays[each] for each in ("prompts", "samples", "weights_version")),
        *(arrays[each] for each in ("sampled_logprobs", "finish")),
    )
    with pytest.raises(ChunkError, match="shard 3 has"):
        pack_rollouts(changed, fingerprint())


def test_a_server_alone_may_keep_log_probabilities_to_itself(tmp_path: Path) -> None:
    shard = make_shard(RECIPE, 0)
    mask_SL = shard.sequences.loss_mask_SL
    shard.sampled_logprobs_SL[mask_SL == 1] = np.nan
    weights = RolloutStore.create(str(tmp_path), RECIPE)
    with pytest.raises(ChunkError, match="that are no number"):
        weights.publish(shard)
    served = RolloutStore.create(str(tmp_path), replace(RECIPE, writer_kind="api"))
    served.publish(shard)
    found = served.fetch(0).sampled_logprobs_SL
    np.testing.assert_array_equal(np.isnan(found), mask_SL == 1)


TOLD = small_rollout_recipe(writer_kind="api", top_logprobs=3)


def test_what_a_server_told_is_stored_as_the_page_says_and_read_back(tmp_path: Path) -> None:
    shard = make_shard(TOLD, 1)
    assert shard.top is not None
    assert 0 < shard.rows_with_logprobs.sum() < len(shard)
    data = pack_rollouts(shard, TOLD.fingerprint)
    found = read_shard(data, TOLD.fingerprint, 1)
    np.testing.assert_array_equal(found["top_ids"], shard.top.ids_SLK)
    np.testing.assert_array_equal(found["top_logprobs"], shard.top.logprobs_SLK)
    store = RolloutStore.create(str(tmp_path), TOLD)
    store.publish(shard)
    assert path_of(store, 1).read_bytes() == data
    for name, array in store.fetch(1).tensors.items():
        np.testing.assert_array_equal(array, shard.tensors[name])


def test_every_cut_and_flipped_bit_of_what_was_told_is_found() -> None:
    data = pack_rollouts(make_shard(TOLD, 2), TOLD.fingerprint)
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        for bad in (bytes(damaged), data[:place]):
            with pytest.raises(ChunkError, match="shard 2"):
                unpack_rollouts(bad, TOLD.fingerprint, 2)


def told_places(shard: Rollouts) -> tuple[int, np.ndarray]:
    """A rollout of which something was told, and the places."""
    assert shard.top is not None
    row = int(np.flatnonzero(shard.rows_with_logprobs)[0])
    return row, np.flatnonzero(shard.top.mask[row])


def without_one(shard: Rollouts, row: int, at: int) -> None:
    assert shard.top is not None
    shard.top.ids_SLK[row, at] = -1
    shard.top.logprobs_SLK[row, at] = np.nan


def without_an_entry(shard: Rollouts, row: int, at: int) -> None:
    assert shard.top is not None
    shard.top.ids_SLK[row, at, 1] = -1


def without_a_number(shard: Rollouts, row: int, at: int) -> None:
    assert shard.top is not None
    shard.top.logprobs_SLK[row, at, 1] = np.nan


def out_of_order(shard: Rollouts, row: int, at: int) -> None:
    assert shard.top is not None
    for array in (shard.top.ids_SLK, shard.top.logprobs_SLK):
        array[row, at] = array[row, at, ::-1].copy()


def tied_out_of_order(shard: Rollouts, row: int, at: int) -> None:
    assert shard.top is not None
    shard.top.ids_SLK[row, at], shard.top.logprobs_SLK[row, at] = [9, 8, 7], -2.0


def one_twice(shard: Rollouts, row: int, at: int) -> None:
    assert shard.top is not None
    shard.top.ids_SLK[row, at, 2] = shard.top.ids_SLK[row, at, 0]


def above_one(shard: Rollouts, row: int, at: int) -> None:
    assert shard.top is not None
    shard.top.ids_SLK[row, at], shard.top.logprobs_SLK[row, at] = [1, 2, 3], np.log(0.335)


def positive(shard: Rollouts, row: int, at: int) -> None:
    assert shard.top is not None
    shard.top.logprobs_SLK[row, at] = [0.0005, -20.0, -21.0]


def infinite(shard: Rollouts, row: int, at: int) -> None:
    assert shard.top is not None
    shard.top.logprobs_SLK[row, at, 2] = -np.inf


def cut_before_its_end(shard: Rollouts, row: int, _at: int) -> None:
    assert shard.finish_S[row] == ENDED
    shard.finish_S[row] = CUT


def of_no_sample(shard: Rollouts, row: int, _at: int) -> None:
    assert shard.top is not None
    shard.top.ids_SLK[row, -1] = [1, 2, 3]
    shard.top.logprobs_SLK[row, -1] = [-1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_one, "for a part of a rollout"),
        (cut_before_its_end, "for a part of a rollout"),
        (of_no_sample, "a token that was not sampled"),
        (without_an_entry, "for a part of a place"),
        (without_a_number, "for a part of a place"),
        (out_of_order, "not in their order"),
        (tied_out_of_order, "not in their order"),
        (one_twice, "with one of them twice"),
        (above_one, r"probabilities sum to 1\.0050"),
        (positive, "infinite, or above 0"),
        (infinite, "infinite, or above 0"),
    ],
)
def test_what_no_server_can_have_told_is_never_written_and_never_read(
    spoil: Callable[[Rollouts, int, int], None], words: str
) -> None:
    shard = make_shard(TOLD, 0)
    row, places = told_places(shard)
    spoil(shard, row, int(places[1]))
    with pytest.raises(ChunkError, match=words):
        pack_rollouts(shard, TOLD.fingerprint)

    # the same bytes, well hashed
    layout = ["prompts", "samples", "weights_version", "sampled_logprobs", "top_logprobs"]
    layout += ["positions", "token_ids", "top_ids", "finish", "loss_mask"]
    body = b"".join(shard.tensors[name].tobytes() for name in layout)
    data = pack_rollouts(make_shard(TOLD, 0), TOLD.fingerprint)
    before, after = (xxhash.xxh3_64_hexdigest(each).encode() for each in (data[-len(body) :], body))
    forged = data[: -len(body)].replace(before, after) + body
    with pytest.raises(ChunkError, match=words):
        unpack_rollouts(forged, TOLD.fingerprint, 0)
    with pytest.raises(Refused, match="rollouts have"):
        read_shard(forged, TOLD.fingerprint, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_logprobs": 0}, "top_logprobs of 0 entries, wanted 3"),
        ({"top_logprobs": 2}, "top_logprobs of 2 entries, wanted 3"),
    ],
)
def test_as_much_is_told_as_the_recipe_asks_for(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    store = RolloutStore.create(str(tmp_path), TOLD)
    with pytest.raises(ChunkError, match=words):
        store.publish(make_shard(replace(TOLD, **changes), 0))
    shard = make_shard(TOLD, 0)
    row, places = told_places(shard)
    assert shard.top is not None
    shard.top.ids_SLK[row, places[0], 0] = 300
    with pytest.raises(ChunkError, match="the id 300 in top_ids, wanted at most 299"):
        store.publish(shard)


def test_a_recipe_that_asks_for_nothing_more_is_as_it_was() -> None:
    assert b"top_logprobs" not in RECIPE.canonical_json()
    assert replace(TOLD, top_logprobs=0) == replace(RECIPE, writer_kind="api")
    assert parse_rollout_recipe(TOLD.canonical_json(), where="here") == TOLD


def test_the_first_publisher_wins_and_what_is_there_is_not_changed(store: RolloutStore) -> None:
    first, second = make_shard(RECIPE, 2), make_shard(RECIPE, 2, salt=1)
    ref = store.publish(first)
    assert (ref.number, ref.num_rollouts, ref.num_tokens, ref.duplicate) == (2, 2, 13, False)
    before = path_of(store, 2).read_bytes()
    assert store.publish(second).duplicate
    assert path_of(store, 2).read_bytes() == before
    assert store.published() == {2}
    assert store.fetch(2).sequences.token_ids_SL.tolist() == first.sequences.token_ids_SL.tolist()
    assert path_of(store, 2).parent == Path(store.url) / "rollouts" / store.folder[-16:] / "shards"


def test_what_a_power_cut_left_is_found_and_made_again(store: RolloutStore) -> None:
    store.publish(make_shard(RECIPE, 0))
    whole = path_of(store, 0).read_bytes()
    path_of(store, 0).write_bytes(whole[:-1])
    assert store.listing() == (set(), {0})
    assert not store.publish(make_shard(RECIPE, 0)).duplicate
    assert path_of(store, 0).read_bytes() == whole
    assert len([*Path(store.url).rglob("quarantine/*")]) == 1


def test_a_damaged_shard_goes_to_quarantine_and_a_sound_one_stays(store: RolloutStore) -> None:
    for number in (0, 1):
        store.publish(make_shard(RECIPE, number))
    damaged = bytearray(path_of(store, 0).read_bytes())
    damaged[-1] ^= 1
    path_of(store, 0).write_bytes(damaged)
    assert [store.quarantine(number) for number in range(3)] == [True, False, True]
    assert store.published() == {1}
    with pytest.raises(ChunkMissing, match="shard 0 is not in"):
        store.fetch(0)


def test_a_verdict_that_arrives_while_its_shard_is_moved_goes_with_it(store: RolloutStore) -> None:
    class Late(Blobs):
        def move(self, source: str, destination: str) -> None:
            if source == store.key(0):
                grader = {"kind": "exact", "version": 1}
                fingerprint = store.recipe.fingerprint
                put_verdict(self, fingerprint, number=0, grader=grader, scores=[0.0] * 4)
            super().move(source, destination)

    store.publish(make_shard(RECIPE, 0))
    path = path_of(store, 0)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert RolloutStore(Late(store.url), store.recipe).quarantine(0)
    assert store.verdict_keys(0) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 1}, "other rollouts"),
        ({"shard_prompts": 1}, "other rollouts"),
        ({"sequence_length": 16}, "rollouts of 16 tokens, wanted 12"),
        ({"vocab_size": 1000}, "wanted at most 299"),
    ],
)
def test_a_shard_of_other_rules_is_not_published(
    store: RolloutStore, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ChunkError, match=words):
        store.publish(make_shard(small_rollout_recipe(**changes), 0))
    assert store.published() == set()


def test_rollouts_have_a_digest_once_all_shards_are_there(store: RolloutStore) -> None:
    for number in (0, 1):
        store.publish(make_shard(RECIPE, number))
    with pytest.raises(StoreError, match=r"1 of 3 shards are not in .*`stillhouse generate`"):
        store.digest()
    store.publish(make_shard(RECIPE, 2))
    before = store.digest()
    assert store.digest() == before
    path_of(store, 1).unlink()
    store.publish(make_shard(RECIPE, 1, salt=1))
    assert store.digest() != before


def test_a_store_is_opened_by_its_fingerprint_and_travels(store: RolloutStore) -> None:
    store.publish(make_shard(RECIPE, 0))
    found = open_rollouts(store.url, RECIPE.fingerprint[:16])
    assert found.recipe == RECIPE
    assert pickle.loads(pickle.dumps(found)).published() == {0}
    with pytest.raises(RecipeError, match="there are no rollouts 0123456789abcdef"):
        open_rollouts(store.url, "0123456789abcdef")
    other = small_rollout_recipe(seed=1)
    Path(store.url, store.recipe_key).write_bytes(other.canonical_json())
    with pytest.raises(RecipeError, match="moved or edited"):
        open_rollouts(store.url, RECIPE.fingerprint[:16])
    with pytest.raises(RecipeError, match="seed: 0 against 1"):
        store.has_recipe()


def test_a_recipe_is_read_back_and_every_field_is_in_its_fingerprint() -> None:
    data = RECIPE.canonical_json()
    assert parse_rollout_recipe(data, where="here") == RECIPE
    changes: dict[str, Any] = {
        name: 0.5 if type(value) is float else (1, 2) if name == "end_ids" else "api"
        for name, value in small_values(RECIPE).items()
        if type(value) is not int
    } | {"seed": 1, "num_prompts": 6, "shard_prompts": 3, "samples": 3, "vocab_size": 400}
    changes |= {"sequence_length": 16, "max_new_tokens": 5, "top_logprobs": 2}
    assert changes.keys() == small_values(RECIPE).keys()
    for name, value in changes.items():
        other = replace(RECIPE, **{name: value})
        assert other.fingerprint != RECIPE.fingerprint
        assert [each.split(":")[0] for each in rollout_differences(RECIPE, other)] == [name]


def small_values(recipe: RolloutRecipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in RolloutRecipe.__dataclass_fields__}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (b'"version":1', b'"version":2', "another version than 1"),
        (b'"version":1', b'"version": 1', "canonical form"),
        (b'"samples":2', b'"samples":true', "samples is True, wanted int"),
        (b'"samples":2', b'"samples":0', "samples is 0, wanted 1 to"),
        (b'"samples":2,', b"", "not a recipe of rollouts"),
        (b'"top_p":1.0', b'"top_p":1.5', "top_p is 1.5"),
        (b'"temperature":1.0', b'"temperature":Infinity', "temperature is inf"),
        (b'"end_ids":[0]', b'"end_ids":[0,300]', "ascending ids below 300"),
        (b'"max_new_tokens":6', b'"max_new_tokens":12', "more than max_new_tokens"),
        (b'"kind":"weights"', b'"kind":"magic"', "writer_kind is 'magic'"),
        (b'"top_p":1.0', b'"top_logprobs":301,"top_p":1.0', "top_logprobs is 301, wanted 0 to 300"),
        (b'"top_p":1.0', b'"top_logprobs":0,"top_p":1.0', "canonical form"),
        (b"{", b"[", "not a recipe of rollouts"),
    ],
)
def test_a_recipe_that_nobody_wrote_so_is_refused(before: bytes, after: bytes, words: str) -> None:
    data = RECIPE.canonical_json()
    assert before in data
    with pytest.raises(RecipeError, match=f"^here.*{words}"):
        parse_rollout_recipe(data.replace(before, after, 1), where="here")
