"""Checkpoints with a command in them that makes one folder, and with checksums that are right:
anyone can compute these."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stillhouse.checkpoint.choice import newest
from stillhouse.checkpoint.integrity import Digest
from stillhouse.checkpoint.manifest import Commit, publish
from stillhouse.store.object_store import Blobs


@dataclass(frozen=True)
class Bomb:
    """What makes the folder `marker` when it is unpickled without care."""

    marker: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def beside_the_rest(path: Path, bomb: Bomb) -> None:
    """The file as it was, and one thing more: whoever opens it without care has no reason to
    complain."""
    torch.save({**torch.load(path, weights_only=False), "more": bomb}, path)


def in_the_old_format(path: Path, bomb: Bomb) -> None:
    """As torch wrote files before they were zip archives: several pickles, one after the other."""
    torch.save(
        {**torch.load(path, weights_only=False), "more": bomb},
        path,
        _use_new_zipfile_serialization=False,
    )


def as_a_plain_pickle(path: Path, bomb: Bomb) -> None:
    """Nothing of torch's."""
    path.write_bytes(pickle.dumps({"module": bomb}))


def instead(path: Path, bomb: Bomb) -> None:
    """Nothing of what was there."""
    torch.save({"param": bomb}, path)


def write_archive(path: Path, instructions: bytes) -> None:
    """A file of torch's zip format with this pickle in it, and no tensor."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", instructions)
        archive.writestr("archive/version", "3\n")


def planted(
    root: Path, into: Path, plant: Callable[[Path], None], *, names: tuple[str, ...]
) -> Commit:
    """Copy the checkpoints of `root`, call `plant` on these files of the newest, and seal that
    anew."""
    shutil.copytree(root, into)
    sound = newest(str(into))
    assert sound is not None
    folder = into / sound.folder
    for name in names:
        plant(folder / name)
    (into / sound.manifest).unlink()
    return publish(
        Blobs(str(into)),
        replace(sound, files={name: _digest_of(folder / name) for name in sound.files}),
    )


def _digest_of(path: Path) -> tuple[int, str]:
    digest = Digest()
    digest.add(path.read_bytes())
    return digest.value
