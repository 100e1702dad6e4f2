"""A name of a grader stands for one grader for ever: it is created once, and read strictly."""

import json
from itertools import count
from pathlib import Path

import pytest

from stillhouse.errors import ChunkError, ConfigError
from stillhouse.store.grader_names import claim_name, named_graders
from stillhouse.store.object_store import Blobs
from stillhouse.store.verdicts import grader_name

ROLLOUTS = "776d667965c2f678" + "0" * 48
NUMBER = {"kind": "number", "version": 1}
FRESH = count()  # stores in memory


def test_a_name_is_claimed_once_and_a_grader_may_have_several() -> None:
    blobs = Blobs(f"memory://{next(FRESH)}")
    assert named_graders(blobs, ROLLOUTS) == {}
    for name in ("number", "number", "the last / one"):
        claim_name(blobs, ROLLOUTS, name=name, grader=NUMBER)
    assert named_graders(blobs, ROLLOUTS) == {
        "number": grader_name(NUMBER),
        "the last / one": grader_name(NUMBER),
    }
    assert named_graders(blobs, "1" * 64) == {}  # of other rollouts
    with pytest.raises(ConfigError, match=r"by the name 'number' .version: 1 against 2"):
        claim_name(blobs, ROLLOUTS, name="number", grader=NUMBER | {"version": 2})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"version":1}', b'"version":2}'),
        (b'"version":1}', b'"version": 1}'),
        (b'"name":"number"', b'"name":"numbers"'),
        (b'"name":"number"', b'"name":3'),
        (b'{"grader":{', b'{"also":1,"grader":{'),
        (b'{"grader":{', b"[" * 50_000),
        (b"}", b""),
    ],
)
def test_what_is_no_name_of_its_place_is_refused(
    tmp_path: Path, before: bytes, after: bytes
) -> None:
    blobs = Blobs(str(tmp_path))
    claim_name(blobs, ROLLOUTS, name="number", grader=NUMBER)
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_bytes()) == {"grader": NUMBER, "name": "number", "version": 1}
    start, found, end = path.read_bytes().rpartition(before)
    assert found
    path.write_bytes(start + after + end)
    with pytest.raises(ChunkError, match=r"is damaged.*delete it"):
        named_graders(blobs, ROLLOUTS)
