"""A recipe is an identity: equal recipes share a fingerprint, unequal ones never do, and a damaged
one is refused."""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from helpers.chunks import small_recipe
from stillhouse.errors import RecipeError
from stillhouse.logits import TargetSpec
from stillhouse.store import Recipe, differences, nearest
from stillhouse.store.recipe import parse_recipe

OTHER_VALUES: dict[str, Any] = {
    "corpus_digest": "xxh3:another",
    "num_sequences": 11,
    "sequence_length": 13,
    "packing": "padded",
    "chunk_sequences": 5,
    "tokenizer_digest": "sha256:another",
    "vocab_size": 301,
    "teacher_digest": "sha256:another",
    "teacher_dtype": "bfloat16",
    "k": 5,
    "num_draws": 1,
    "temperature": 2.0,
    "value_bits": 6,
    "format": 1,
    "source_kind": "sums",
    "teacher_kind": "api",
    "weighted": True,
    "label_logprob": True,
    "tail_entropy": True,
}


def test_the_fingerprint_is_the_sha256_of_the_bytes_of_recipe_json() -> None:
    data = small_recipe().canonical_json()
    assert small_recipe().fingerprint == hashlib.sha256(data).hexdigest()
    assert data.isascii()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()


def test_the_fingerprint_of_a_recipe_does_not_change_from_release_to_release() -> None:
    assert (
        small_recipe().fingerprint
        == "bc790acc40d8b6ba9892ad8c1b625b35339fb8d879fbca52e2ff9883b2be1a7f"
    )


def test_draws_are_seeded_by_all_that_decides_a_target() -> None:
    assert small_recipe().draw_seed == int("bc790acc40d8b6ba", 16) - 2**64
    assert small_recipe(num_draws=1).draw_seed != small_recipe(num_draws=2).draw_seed


def test_every_field_of_a_recipe_is_in_its_fingerprint() -> None:
    assert set(OTHER_VALUES) == {field.name for field in fields(Recipe)}
    recipe = small_recipe(format=2, num_draws=2)
    others = {replace(recipe, **{name: value}).fingerprint for name, value in OTHER_VALUES.items()}
    assert len(others | {recipe.fingerprint}) == len(OTHER_VALUES) + 1


def test_a_whole_number_as_temperature_is_the_same_recipe() -> None:
    assert small_recipe(temperature=2).fingerprint == small_recipe(temperature=2.0).fingerprint


def test_a_recipe_survives_its_json_and_a_pickle() -> None:
    recipe = small_recipe(temperature=0.7, num_draws=3, teacher_digest="tête")
    full: dict[str, Any] = {
        "weighted": True,
        "label_logprob": True,
        "tail_entropy": True,
        "teacher_kind": "api",
    }
    for each in (recipe, replace(recipe, format=2), replace(recipe, format=2, **full)):
        assert parse_recipe(each.canonical_json(), where="here") == each
        assert pickle.loads(pickle.dumps(each)) == each


def test_format_1_holds_what_it_has_a_place_for_and_refuses_the_rest_in_words() -> None:
    newest = small_recipe(format=2, num_draws=2)
    assert newest.in_format_1() == small_recipe(num_draws=2)
    own = replace(newest, source_kind="sums", corpus_digest="0-96x24")
    assert own.in_format_1() == small_recipe(num_draws=2, corpus_digest="sums:0-96x24")
    for name in ("weighted", "label_logprob", "tail_entropy"):
        asked: dict[str, Any] = {name: True}
        assert replace(newest, **asked).in_format_1() is None
        with pytest.raises(RecipeError, match=f"{name} is True, which format 1 cannot hold"):
            small_recipe(num_draws=2, **asked)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ((b'"format":2', b'"format":1'), "codec_version 2"),
        ((b'"source":{', b'"source":7,"s":{'), "s, source.digest, source.kind"),
        ((b'"numerics"', b'"dtype"'), "teacher.dtype, teacher.numerics"),
        ((b'"draws":"ids"', b'"draws":[]'), "weighted is \\[\\]"),
        ((b'"draws":"ids"', b'"draws":true'), "not in canonical form|no draws"),
        ((b'"label_logprob":0', b'"label_logprob":1'), "label_logprob is 1, wanted bool"),
        ((b'"tail_entropy":0', b'"tail_entropy":false'), "not in canonical form"),
    ],
)
def test_a_damaged_recipe_of_format_2_is_refused_saying_why(
    damage: tuple[bytes, bytes], complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        parse_recipe(small_recipe(format=2).canonical_json().replace(*damage), where="here")


def test_chunks_cover_every_sequence_once() -> None:
    recipe = small_recipe()
    assert recipe.num_chunks == 3
    assert [row for number in range(3) for row in recipe.chunk_rows(number)] == list(range(10))
    assert small_recipe(num_sequences=8).num_chunks == 2
    for number in (-1, 3):
        with pytest.raises(RecipeError, match=f"no chunk {number}.*3 chunks"):
            recipe.chunk_rows(number)


def test_the_codec_is_the_recipes() -> None:
    recipe = small_recipe(k=7, num_draws=2, value_bits=6, temperature=0.5)
    assert recipe.spec == TargetSpec(300, 7, num_draws=2, value_bits=6, temperature=0.5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"corpus_digest": ""}, "corpus_digest is empty"),
        ({"teacher_digest": None}, "teacher_digest is None, wanted str"),
        ({"num_sequences": 0}, "num_sequences is 0, wanted at least 1"),
        ({"sequence_length": 1}, "sequence_length is 1, wanted at least 2"),
        ({"chunk_sequences": True}, "chunk_sequences is True, wanted int"),
        ({"k": 301}, "k is 301, but the vocabulary has 300 ids"),
        ({"k": 0}, "no entries and no draws"),
        ({"k": -1}, "k is -1"),
        ({"num_draws": -1}, "-1 draws are asked for"),
        (
            {"k": 300, "num_draws": 2},
            "2 draws are asked for, but k is 300, the whole vocabulary",
        ),
        ({"value_bits": 7}, "value_bits is 7, wanted 6 or 8"),
        ({"packing": True}, "packing is True, wanted str"),
        ({"packing": "loose"}, "packing is 'loose', wanted 'packed' or 'padded'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1', wanted float or int"),
    ],
)
def test_a_value_that_no_store_can_have_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        small_recipe(**change)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda text: text[:-5], "not JSON"),
        (lambda text: b"\xff" + text, "not JSON"),
        (lambda _: b"[" * 100_000, "not JSON"),
        (lambda _: b"[]", "JSON list, wanted an object"),
        (
            lambda text: text.replace(b'"format":1', b'"format":3'),
            "format 3, this Stillhouse reads 1 to 2",
        ),
        (lambda text: text.replace(b'"codec_version":1', b'"codec_version":9'), "codec_version 9"),
        (lambda text: text.replace(b'"k":4,', b""), "missing or unknown are k"),
        (lambda text: text.replace(b'"k":4,', b'"k":4,"kk":4,'), "missing or unknown are kk"),
        (lambda text: text.replace(b'"k":4,', b'"k":-4,'), "k is -4"),
        (lambda text: text.replace(b"ef-sqrt8", b"ef-sqrt6"), "not in canonical form"),
        (lambda text: text.replace(b'"k":4,', b'"k": 4,'), "not in canonical form"),
        (lambda text: text + b"\n", "not in canonical form"),
    ],
)
def test_a_damaged_recipe_json_is_refused_by_name(
    damage: Callable[[bytes], bytes], complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint) as caught:
        parse_recipe(damage(small_recipe().canonical_json()), where="s3://bucket/recipe.json")
    assert "s3://bucket/recipe.json" in str(caught.value)


def test_differences_are_told_in_words_with_both_values() -> None:
    assert differences(small_recipe(), small_recipe()) == []
    assert differences(small_recipe(), small_recipe(k=5, teacher_dtype="bfloat16")) == [
        "teacher_dtype (the teacher's number format): 'float32' against 'bfloat16'",
        "k (exact entries a token): 4 against 5",
    ]


def test_the_nearest_recipe_differs_in_the_fewest_fields() -> None:
    one, two = small_recipe(k=5), small_recipe(k=6, vocab_size=400)
    assert nearest([two, one], small_recipe()) == one
    assert nearest([], small_recipe()) is None
    ties = [small_recipe(k=8), small_recipe(k=9)]
    assert nearest(ties, small_recipe()) == nearest(ties[::-1], small_recipe())
