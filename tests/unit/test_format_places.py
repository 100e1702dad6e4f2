"""docs/format.md is enough to read what lies beside the chunks of a store: `helpers.placereader` is
written from its section 9 alone, and the golden files are written without this package."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xxhash

from helpers.pagereader import Refused, recipe_json
from helpers.placereader import (
    DTYPES,
    canonical,
    read_label,
    read_manifest,
    read_shard,
    read_verdict,
)
from stillhouse.store import ChunkStore, parse_recipe
from stillhouse.store.labels import labels_of, put_label

GOLDEN = Path(__file__).parents[1] / "golden"
PLACES = GOLDEN / "places"
KEYS = {
    re.sub(r"[0-9a-f]{16}", "<f>", key): key
    for key in (str(path.relative_to(PLACES)) for path in PLACES.rglob("*") if path.is_file())
}
LABEL = "<f>/labels/demo-19acd3a5e00.json"
RULES = "rollouts/<f>/recipe.json"
SHARD = "rollouts/<f>/shards/0000000003.safetensors"
VERDICT = "rollouts/<f>/verdicts/<f>/0000000003.json"
MANIFEST = "weights/<f>/0000000120.json"
MODEL = "weights/<f>/0000000120/model.safetensors"


def data_of(place: str) -> bytes:
    return (PLACES / KEYS[place]).read_bytes()


def fingerprint() -> str:
    """Of the rules of the rollouts."""
    return hashlib.sha256(data_of(RULES)).hexdigest()


def test_the_golden_places_are_those_that_the_page_names() -> None:
    assert set(KEYS) == {LABEL, RULES, SHARD, VERDICT, MANIFEST, MODEL}
    assert KEYS[RULES].split("/")[1] == fingerprint()[:16]
    assert data_of(RULES) == canonical(json.loads(data_of(RULES)))


def test_a_reader_written_from_the_page_reads_the_golden_places() -> None:
    assert read_label(data_of(LABEL), "demo-19acd3a5e00")["names"]["teacher"] == "org/a-tête"
    rollouts = read_shard(data_of(SHARD), fingerprint(), 3)
    assert rollouts["token_ids"].tolist() == [[11, 12, 30, 2, 0, 0], [11, 12, 31, 32, 33, 34]]
    assert rollouts["sampled_logprobs"][0].tolist() == [0.0, -0.5, -0.25, 0.0, 0.0, 0.0]
    assert [rollouts[name].tolist() for name in ("prompts", "samples", "finish")] == [
        [7, 7],
        [0, 1],
        [0, 1],
    ]
    grader = KEYS[VERDICT].split("/")[3]
    assert read_verdict(data_of(VERDICT), grader, num_rollouts=2) == [1.0, 0.25]
    manifest = read_manifest(data_of(MANIFEST), 120)
    model = data_of(MODEL)
    assert manifest["files"] == {
        "model.safetensors": {"bytes": len(model), "xxh3": xxhash.xxh3_64_hexdigest(model)}
    }


def test_every_flipped_bit_and_every_cut_of_a_shard_is_found() -> None:
    data = data_of(SHARD)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        for bad in (bytes(damaged), data[:place]):
            with pytest.raises(Refused):
                read_shard(bad, fingerprint(), 3)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("prompts", (0,), -1),
        ("weights_version", (1,), -2),
        ("sampled_logprobs", (0, 1), 0.5),
        ("sampled_logprobs", (0, 1), np.nan),
        ("sampled_logprobs", (0, 0), -0.5),
        ("positions", (0, 0), 1),
        ("positions", (0, 2), 5),
        ("token_ids", (0, 0), -1),
        ("finish", (0,), 3),
        ("loss_mask", (0, 1), 2),
        ("loss_mask", (1, 5), 1),
    ],
)
def test_values_that_the_page_does_not_have_are_refused_whatever_the_checksum(
    name: str, place: tuple[int, ...], value: float
) -> None:
    data = data_of(SHARD)
    end = 8 + int.from_bytes(data[:8], "little")
    tensor = json.loads(data[8:end])[name]
    start, stop = (end + offset for offset in tensor["data_offsets"])
    changed = np.frombuffer(data[start:stop], DTYPES[tensor["dtype"]]).copy()
    changed.reshape(tensor["shape"])[place] = value
    body = data[end:start] + changed.tobytes() + data[stop:]
    before, after = (xxhash.xxh3_64_hexdigest(each).encode() for each in (data[end:], body))
    with pytest.raises(Refused, match=r"^rollouts have"):
        read_shard(data[:end].replace(before, after) + body, fingerprint(), 3)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"version":1}', b'"version":2}'),
        (b'"version":1}', b'"version":1,"w":1}'),
        (b'"version":1}', b'"version": 1}'),
        (b'"version":1}', b'"version":1'),
        (b"T08:00:00Z", b" 08:00:00"),
        (b'"stillhouse":"0.1.0"', b'"stillhouse":1'),
        (b'"run":"demo', b'"run":"another'),
    ],
)
def test_a_label_that_the_page_forbids_is_refused(before: bytes, after: bytes) -> None:
    changed = data_of(LABEL).replace(before, after)
    assert changed != data_of(LABEL)
    with pytest.raises(Refused):
        read_label(changed, "demo-19acd3a5e00")


def test_stillhouse_writes_the_golden_label_and_reads_it(tmp_path: Path) -> None:
    values = json.loads((GOLDEN / "chunk_v1_top3.json").read_text())["recipe"]
    recipe = parse_recipe(recipe_json(values), where="here")
    (label,) = labels_of(ChunkStore(str(PLACES), recipe)).labels
    put_label(ChunkStore(str(tmp_path), recipe), label)
    assert (tmp_path / KEYS[LABEL]).read_bytes() == data_of(LABEL)
