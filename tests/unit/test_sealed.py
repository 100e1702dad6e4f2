"""Sealed JSON: a change of any value is found, and both forms of the checksum are those that
readers of the files expect."""

import json
from typing import Any

import pytest
import xxhash

from stillhouse.sealed import digest_of, opened, sealed

VALUES: dict[str, Any] = {"b": [1, 2.5, None], "a": {"é": "ü", "z": True}}


@pytest.mark.parametrize(
    ("compact", "text"),
    [(False, r'{"a": {"z": true, "\u00e9": "\u00fc"}, "b": [1, 2.5, null]}'), (True, None)],
)
def test_the_checksum_is_of_the_sorted_text_with_spaces_or_without(
    compact: bool, text: str | None
) -> None:
    text = text or r'{"a":{"z":true,"\u00e9":"\u00fc"},"b":[1,2.5,null]}'
    assert digest_of(VALUES, compact=compact) == xxhash.xxh3_64_hexdigest(text.encode())


@pytest.mark.parametrize("compact", [False, True])
def test_sealed_values_open_in_any_layout_and_no_other_ones_do(compact: bool) -> None:
    whole = sealed(VALUES, name="check", compact=compact)
    assert list(whole) == ["b", "a", "check"]
    for layout in ({}, {"indent": 2}, {"sort_keys": True}):
        assert (
            opened(json.loads(json.dumps(whole, **layout)), name="check", compact=compact) == VALUES
        )
    assert "check" in whole  # what is opened stays as it is
    for other in (
        whole | {"b": [1, 2.5, 0]},
        whole | {"c": 1},
        whole | {"check": None},
        sealed(VALUES, name="check", compact=not compact),
    ):
        with pytest.raises(ValueError, match="its checksum differs"):
            opened(other, name="check", compact=compact)


@pytest.mark.parametrize("whole", [[1], 3, None, "text", {"a": 1}])
def test_what_cannot_be_sealed_is_refused(whole: Any) -> None:
    with pytest.raises((KeyError, TypeError)):
        opened(whole)
