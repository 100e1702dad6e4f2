"""A checkpoint whose manifest names what it should not: nothing outside its folder is touched."""

from pathlib import Path

import pytest

from helpers.checkpoints import ORIGIN, make, write_files
from stillhouse.store.blobs import Blobs
from stillhouse.student.checkpoint import Commit, Digest, newest, publish


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
