"""A verdict holds a grader's scores of one shard of rollouts. It is created once, in the bytes that
docs/format.md fixes, and read strictly."""

import json
import random
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.bounded import bounded, measured_memory
from helpers.mutants import dumps, mutated_bytes, mutated_json
from helpers.pagereader import Refused
from helpers.placereader import canonical
from helpers.placereader import read_verdict as page_reads
from stillhouse.errors import ChunkError
from stillhouse.store.object_store import Blobs
from stillhouse.store.verdicts import grader_name, put_verdict, read_verdict, verdict_key

PLACES = Path(__file__).parents[1] / "golden" / "places"
ROLLOUTS = "776d667965c2f678" + "0" * 48
GRADER = {"kind": "exact-match", "version": 1}
NAME = grader_name(GRADER)
SHARD = 3
FRESH = count()  # stores in memory


def read(blobs: Blobs, *, num_rollouts: int = 2) -> tuple[float, ...] | None:
    return read_verdict(blobs, ROLLOUTS, number=SHARD, grader=NAME, num_rollouts=num_rollouts)


def put(blobs: Blobs, scores: list[float], *, grader: dict[str, object] = GRADER) -> bool:
    return put_verdict(blobs, ROLLOUTS, number=SHARD, grader=grader, scores=scores)


def test_stillhouse_writes_the_golden_verdict_and_reads_it(tmp_path: Path) -> None:
    key = verdict_key(ROLLOUTS, NAME, SHARD)
    scores = read(Blobs(str(PLACES)))
    assert scores == (1.0, 0.25)
    assert put(Blobs(str(tmp_path)), [*scores])
    assert (tmp_path / key).read_bytes() == (PLACES / key).read_bytes()


def test_a_verdict_is_created_once_and_a_shard_without_one_has_not_been_graded() -> None:
    blobs = Blobs(f"memory://{next(FRESH)}")
    assert read(blobs) is None
    assert put(blobs, [1, 0.5])
    assert not put(blobs, [0, 0])
    assert read(blobs) == (1.0, 0.5)


@settings(max_examples=25)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)
def test_a_grader_more_changes_no_byte_of_another(
    scores: list[float], identity: dict[str, object]
) -> None:
    blobs = Blobs(f"memory://{next(FRESH)}")
    put(blobs, [1, 0.5])
    before = {blob.key: bytes(blobs.read(blob.key)) for blob in blobs.under("rollouts")}
    assert put(blobs, scores, grader=identity) == (identity != GRADER)
    after = {blob.key: bytes(blobs.read(blob.key)) for blob in blobs.under("rollouts")}
    assert after.items() >= before.items()
    assert len(after) == len(before) + (identity != GRADER)
    name = grader_name(identity)
    found = read_verdict(blobs, ROLLOUTS, number=SHARD, grader=name, num_rollouts=len(scores))
    assert identity == GRADER or found == tuple(scores)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), float("inf")])
def test_only_scores_from_0_to_1_are_written(bad: float) -> None:
    with pytest.raises(AssertionError):
        put(Blobs(f"memory://{next(FRESH)}"), [bad])


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (b"[1.0,0.25]", b"[1.0]", "a list of 2 scores"),
        (b"[1.0,0.25]", b'[1.0,"0"]', "no number"),
        (b"[1.0,0.25]", b"[1.0,true]", "no number"),
        (b"[1.0,0.25]", b"[1.0,1" + b"0" * 400 + b"]", "no number"),
        (b"[1.0,0.25]", b"[1.0,NaN]", "not canonical"),
        (b"[1.0,0.25]", b"[1.0, 0.25]", "not canonical"),
        (b"[1.0,0.25]", b"{}", "a list of 2 scores"),
        (b"exact-match", b"judge", "its grader is another"),
        (b',"version":1}', b',"version":2}', "with version 1"),
        (b',"version":1}', b',"version":true}', "with version 1"),
        (b',"version":1}', b',"version":1,"w":1}', "the keys"),
        (b'{"grader"', b"[" * 50_000 + b'{"grader"', "not canonical"),
        (b"}", b"", "not canonical"),
    ],
)
def test_what_is_no_verdict_of_its_place_is_refused_in_words(
    tmp_path: Path, before: bytes, after: bytes, words: str
) -> None:
    blobs = Blobs(str(tmp_path))
    put(blobs, [1, 0.25])
    path = tmp_path / verdict_key(ROLLOUTS, NAME, SHARD)
    start, found, end = path.read_bytes().rpartition(before)
    assert found
    path.write_bytes(start + after + end)
    with pytest.raises(ChunkError, match=f"is damaged: .*{words}.*delete it"):
        read(blobs)


def test_something_else_in_a_verdicts_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / verdict_key(ROLLOUTS, NAME, SHARD)).mkdir(parents=True)
    with pytest.raises(ChunkError, match="is damaged"):
        read(Blobs(str(tmp_path)))


def test_whatever_its_bytes_are_a_verdict_is_read_where_the_page_says_so(tmp_path: Path) -> None:
    rng, blobs = random.Random(0), Blobs(str(tmp_path))
    put(blobs, [1, 0.25])
    path = tmp_path / verdict_key(ROLLOUTS, NAME, SHARD)
    values = json.loads(path.read_bytes())
    num_read = 0
    with measured_memory():
        for _ in range(250):
            if rng.random() < 0.4:
                data = mutated_bytes(rng, canonical(values))
            else:
                data = dumps(mutated_json(rng, values), sort_keys=True, separators=(",", ":"))
            path.write_bytes(data)
            found = bounded(lambda: read(blobs), num_bytes=len(data), refusal=ChunkError)
            assert (found is not None) == page_allows(data), data
            num_read += found is not None
    assert num_read < 250


def page_allows(data: bytes) -> bool:
    try:
        page_reads(data, NAME, num_rollouts=2)
    except (Refused, RecursionError):
        return False
    return True
