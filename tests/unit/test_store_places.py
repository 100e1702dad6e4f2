"""Places beside the chunks are the ones of the format page, and a label is written once."""

from pathlib import Path

from stillhouse.store.object_store import Blobs
from stillhouse.store.places import (
    create_label,
    label_key,
    rollout_recipe_key,
    shard_key,
    verdict_key,
    weights_key,
)

ONE, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4


def test_places_are_where_the_format_page_has_them() -> None:
    assert label_key(ONE, "demo") == "0123456789abcdef/labels/demo.json"
    assert rollout_recipe_key(ONE) == "rollouts/0123456789abcdef/recipe.json"
    assert shard_key(ONE, 12) == "rollouts/0123456789abcdef/shards/0000000012.safetensors"
    assert verdict_key(ONE, OTHER, 12) == (
        "rollouts/0123456789abcdef/verdicts/fedcba9876543210/0000000012.json"
    )
    assert weights_key(ONE, 120) == "weights/0123456789abcdef/0000000120.json"


def test_a_label_is_written_once_and_stays(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path))
    assert create_label(blobs, ONE, run="demo", names={"teacher": "tête"}, now=0.0)
    assert not create_label(blobs, ONE, run="demo", names={}, now=1.0)
    assert (tmp_path / label_key(ONE, "demo")).read_bytes() == (
        b'{"created":"1970-01-01T00:00:00Z","names":{"teacher":"t\\u00eate"},"run":"demo",'
        b'"version":1}'
    )
