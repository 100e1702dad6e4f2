"""A checkpoint whose manifest names what it should not: nothing outside its folder is touched."""

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash

from helpers.checkpoints import ORIGIN, make, write_files
from helpers.sealing import canonical
from stillhouse.checkpoint.choice import choose, newest, retain
from stillhouse.checkpoint.integrity import Digest
from stillhouse.checkpoint.manifest import Commit, part_of, publish, read_part
from stillhouse.errors import CheckpointError
from stillhouse.store.object_store import Blobs


@pytest.mark.parametrize("name", ["../outside", "{elsewhere}/outside", "a/b", "plain"])
def test_a_manifest_that_names_files_elsewhere_is_passed_over(tmp_path: Path, name: str) -> None:
    """The file is there, to the byte: it is the name that is refused."""
    url, name = str(tmp_path / "checkpoints"), name.format(elsewhere=tmp_path)
    (sound,) = make(url, 4)
    folder = Path(url) / write_files(url, 8)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"weights")
    digest = Digest()
    digest.add(b"weights")
    hostile = publish(Blobs(url), Commit(8, "a", 2, ORIGIN, {name: digest.value}))
    assert newest(url) == (hostile if name == "plain" else sound)


def sealed(kind: str, values: Any) -> bytes:
    """A part or a manifest whose checksum is right."""
    return json.dumps({kind: values, "xxh3": xxhash.xxh3_64_hexdigest(canonical(values))}).encode()


DEEP = b"[" * 100_000
STRANGE_FILES = {
    "a size that is infinite": [float("inf"), "0" * 16],
    "a size that is a text": ["8", "0" * 16],
    "a size that is a truth": [True, "0" * 16],
    "a checksum that is a number": [8, 12],
}


@pytest.mark.parametrize("case", ["deep", *STRANGE_FILES])
def test_a_manifest_that_is_none_is_passed_over_and_deleted_in_its_turn(
    tmp_path: Path, case: str
) -> None:
    first, last = make(tmp_path, 4, 8)
    blobs, path = Blobs(str(tmp_path)), tmp_path / last.manifest
    values = json.loads(path.read_bytes())["commit"]
    data = (
        DEEP
        if case == "deep"
        else sealed(
            "commit", {**values, "files": {**values["files"], "empty": STRANGE_FILES[case]}}
        )
    )
    path.write_bytes(data)
    choice = choose(blobs, lambda _: "")
    assert choice.commit == first
    assert choice.passed_over["step-00000008.json"].startswith("the manifest cannot be read")
    make(tmp_path, 12)
    retain(blobs, 2)
    assert blobs.names() == ["step-00000008.json", "step-00000012.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"step": 8.0},
        {"step": "8"},
        {"attempt": 5},
        {"world_size": "two"},
        {"world_size": 2.5},
        {"origin": None},
    ],
)
def test_a_manifest_whose_values_are_of_other_types_is_passed_over(
    tmp_path: Path, change: dict[str, object]
) -> None:
    first, last = make(tmp_path, 4, 8)
    path = tmp_path / last.manifest
    path.write_bytes(sealed("commit", {**json.loads(path.read_bytes())["commit"], **change}))
    assert newest(str(tmp_path)) == first


@pytest.mark.parametrize("case", ["deep", *STRANGE_FILES])
def test_a_part_that_is_none_is_refused_by_its_ranks_name(tmp_path: Path, case: str) -> None:
    folder = write_files(str(tmp_path), 4)
    (tmp_path / folder / part_of(1, 2)).write_bytes(
        DEEP if case == "deep" else sealed("part", {"empty": STRANGE_FILES[case]})
    )
    with pytest.raises(CheckpointError, match="which rank 1 has written, cannot be read"):
        read_part(Blobs(str(tmp_path)), folder, rank=1, world_size=2)
