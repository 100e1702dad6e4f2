"""Checkpoints in two phases: every rank writes its files and a part, then ONE create-only manifest
makes them a commit.

    <root>/step-00000120.k3f9a2c1/...                         files of DeepSpeed's, but no code
    <root>/step-00000120.k3f9a2c1/part-00001-of-00002.json    {"part": a rank's files with size and
                                                              xxh3, "xxh3": of that}
    <root>/step-00000120.json                                 {"commit": all files, and what was
                                                              trained, "xxh3": of that}

The root is a directory or an object store. `k3f9a2c1` names an attempt: one life of one group of
ranks. What an earlier attempt left torn at the same step is in another folder, and no manifest
names it. DeepSpeed loads flipped bits without an error. So a folder without a manifest is not used,
nor a manifest whose files do not have the sizes and checksums in it.

Here is the format: names, values, and how they are published and read. `integrity` verifies files,
`choice` finds the commit to go on from.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import xxhash

from stillhouse.errors import CheckpointError
from stillhouse.sealed import digest_of
from stillhouse.store.object_store import Blobs

Files = Mapping[str, tuple[int, str]]  # name -> (bytes, xxh3)

# what reading a damaged manifest or part may raise
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, FileNotFoundError)

_Value = TypeVar("_Value")

_MANIFEST = re.compile(r"step-\d{8}\.json")


@dataclass(frozen=True, slots=True)
class Origin:
    """What was trained. A training goes on from a checkpoint only where this is the same."""

    zero_stage: int
    fingerprint: str  # of the recipe that it learned from
    settings: Mapping[str, Any]  # of the student, as far as they decide its weights; JSON values


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint that every rank has finished writing."""

    step: int  # optimiser steps done
    attempt: str
    world_size: int
    origin: Origin
    files: Files

    @property
    def folder(self) -> str:
        return folder_of(self.step, self.attempt)

    @property
    def manifest(self) -> str:
        return manifest_of(self.step)

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def tag_of(step: int) -> str:
    """How the names of a checkpoint after `step` optimiser steps begin."""
    return f"step-{step:08d}"


def manifest_of(step: int) -> str:
    """The manifest that makes a checkpoint after `step` optimiser steps a commit."""
    return f"{tag_of(step)}.json"


def folder_of(step: int, attempt: str) -> str:
    """The folder of one attempt's files of a checkpoint."""
    return f"{tag_of(step)}.{attempt}"


def part_of(rank: int, world_size: int) -> str:
    """The name of a rank's part, which lists its files."""
    return f"part-{rank:05d}-of-{world_size:05d}.json"


def publish_part(blobs: Blobs, folder: str, *, rank: int, world_size: int, files: Files) -> None:
    """Publish which files this rank has written. Idempotent."""
    blobs.replace(f"{folder}/{part_of(rank, world_size)}", _sealed("part", dict(files)))


def read_part(blobs: Blobs, folder: str, *, rank: int, world_size: int) -> Files:
    """The files that a rank has written, and the part itself.

    Raises FileNotFoundError before it is there, and CheckpointError where it is damaged.
    """
    name = part_of(rank, world_size)
    try:
        data, values = _read_sealed(blobs, f"{folder}/{name}", "part")
        files = _files(values)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(
            f"{blobs.url}/{folder}/{name}, which rank {rank} has written, cannot be read "
            f"({error}): its disk or memory is damaged. Start again: training goes on from the "
            "commit before."
        ) from None
    return {**files, name: (len(data), xxhash.xxh3_64_hexdigest(data))}


def publish(blobs: Blobs, commit: Commit) -> Commit:
    """Publish the manifest, and return the commit that stands: where another group of the same
    training has committed the step before, its own.

    The commit outlasts a power cut once this returns: only then may anything older be deleted, or
    the commit be reported. Raises CheckpointError where the step was committed by another training.
    """
    # files before the manifest that names them, those of the other ranks too
    if not commit.files:
        raise CheckpointError(
            f"no rank wrote a file for step {commit.step}: there is nothing to commit"
        )
    blobs.sync(commit.folder)
    if blobs.create(commit.manifest, _sealed("commit", asdict(commit))):
        return commit
    # lost the race: the other commit counts, if it is of this training
    try:
        standing = read_commit(blobs, commit.manifest)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{blobs.url}/{commit.manifest} exists already, and cannot be read ({error}); remove it"
        ) from None
    if standing.origin != commit.origin:
        raise CheckpointError(
            f"{blobs.url}/{commit.manifest} exists already, and is of another training:\n"
            + "\n".join(f"  - {line}" for line in unlike(standing.origin, commit.origin))
            + "\nGive each run a --run-dir and a student.checkpoint_url of its own"
        )
    return standing


def unlike(found: Origin, wanted: Origin) -> list[str]:
    """What differs between two origins, each as 'name: found ..., wanted ...'."""
    before, after = (
        {"zero_stage": o.zero_stage, "recipe": o.fingerprint[:16], **o.settings}
        for o in (found, wanted)
    )
    return [
        f"{name}: found {before.get(name)!r}, wanted {after.get(name)!r}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]


def require_same_training(url: str, commit: Commit, origin: Origin) -> None:
    """Raise CheckpointError where a training of this origin cannot go on from the commit."""
    if differences := unlike(commit.origin, origin):
        raise CheckpointError(
            f"{url} belongs to another training:\n"
            + "\n".join(f"  - {line}" for line in differences)
            + "\nSet them back to go on with it, or use a new run directory and, where one is "
            "set, a new student.checkpoint_url."
        )


def manifest_names(blobs: Blobs) -> list[str]:
    """The names of all manifests under the root, oldest step first."""
    return [name for name in blobs.names() if _MANIFEST.fullmatch(name)]


def read_commit(blobs: Blobs, name: str) -> Commit:
    """The commit of a manifest. Raises one of UNREADABLE where the manifest is damaged."""
    _, values = _read_sealed(blobs, name, "commit")
    found = commit_of(values)
    if found.manifest != name:
        raise ValueError(f"it is of step {found.step}")
    return found


def commit_of(values: Mapping[str, Any]) -> Commit:
    """The commit with these JSON values. Raises one of UNREADABLE where they do not make one."""
    origin = values["origin"]
    found = Commit(
        _of(int, values["step"]),
        _of(str, values["attempt"]),
        _of(int, values["world_size"]),
        Origin(
            _of(int, origin["zero_stage"]),
            _of(str, origin["fingerprint"]),
            dict(_of(dict, origin["settings"])),
        ),
        _files(values["files"]),
    )
    if not found.files:
        raise ValueError("it names no file")
    if not _is_plain(found.attempt):
        raise ValueError(f"it names the attempt {found.attempt}, which is outside of its root")
    return found


def _files(values: dict[str, Any]) -> Files:
    files = {
        _of(str, name): (_of(int, size), _of(str, digest))
        for name, (size, digest) in values.items()
    }
    for name in files:
        if not _is_plain(name):
            raise ValueError(f"it names {name}, which is outside of the checkpoint")
    return files


def _of(kind: type[_Value], value: Any) -> _Value:
    """The value, whose type must be this one itself: True is no int here."""
    if type(value) is not kind:
        raise TypeError(f"it has {value!r:.100}, wanted a value of type {kind.__name__}")
    return value


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w.=-]+", name) is not None and name not in (".", "..")


def _sealed(kind: str, values: Any) -> bytes:
    return json.dumps({kind: values, "xxh3": digest_of(values, compact=True)}, indent=1).encode()


def _read_sealed(blobs: Blobs, key: str, kind: str) -> tuple[bytes, Any]:
    """The bytes of a part or a manifest, and its values. Read a second time, by other requests,
    before it is called damaged: then raises one of UNREADABLE."""
    data = bytes(blobs.read(key))
    try:
        return data, _opened(kind, data)
    except UNREADABLE:
        data = b"".join(blobs.pieces(key))
        return data, _opened(kind, data)


def _opened(kind: str, data: bytes) -> Any:
    whole = json.loads(data)
    if whole["xxh3"] != digest_of(whole[kind], compact=True):
        raise ValueError("its checksum differs")
    return whole[kind]
