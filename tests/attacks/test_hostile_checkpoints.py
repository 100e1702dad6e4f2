"""A checkpoint that somebody else wrote, or that names what it should not: nothing in it is run, nothing outside its folder is touched."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import ORIGIN, make, write_files
from stillhouse.store.blobs import Blobs
from stillhouse.student.checkpoint import Commit, Digest, newest, publish
from stillhouse.student.engine import consolidated_weights


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, target: Path):
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._target),)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    folder, target = tmp_path / "step", tmp_path / "it ran"
    folder.mkdir()
    torch.save({"module": {"lm.weight": Bomb(target)}}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        consolidated_weights(folder, zero_stage=1)
    assert not target.exists()


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
