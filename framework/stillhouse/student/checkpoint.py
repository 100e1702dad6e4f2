"""Checkpoints in two steps: every rank writes its files, then ONE create-only manifest makes them a commit.

    <root>/step-00000120/...        what DeepSpeed wrote
    <root>/step-00000120.json       {"commit": every file's size and xxh3, and what the checkpoint is of, "xxh3": of that}

DeepSpeed publishes its own `latest` before every rank has written, and loads flipped bits without a word; so nothing here trusts a
directory that has no manifest, or a manifest whose files do not hash to what it says.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from stillhouse.errors import CheckpointError

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint that every rank finished writing."""

    step: int  # optimiser steps done
    world_size: int
    zero_stage: int
    fingerprint: str  # of the recipe that it learned from
    files: dict[str, tuple[int, str]]  # relative path -> (bytes, xxh3)

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def tag_of(step: int) -> str:
    """The directory name of a checkpoint after `step` optimiser steps."""
    return f"step-{step:08d}"


def commit(root: Path, *, step: int, world_size: int, zero_stage: int, fingerprint: str) -> Commit:
    """Hash what all ranks wrote under `tag_of(step)` and publish the manifest. One rank calls this, after a barrier."""
    folder = root / tag_of(step)
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise CheckpointError(f"{folder} is empty: no rank wrote its part of the checkpoint; is it on a file system that all ranks share?")
    made = Commit(step, world_size, zero_stage, fingerprint, files)
    values = asdict(made)
    _publish(root / f"{tag_of(step)}.json", json.dumps({"commit": values, "xxh3": _digest_of(values)}, indent=1))
    return made


def newest(root: Path) -> Commit | None:
    """The newest commit whose every byte verifies, else the one before, and so on; None where nothing was ever committed.

    Raises CheckpointError when there are commits and none of them verifies.
    """
    manifests = sorted(root.glob("step-*.json"), reverse=True)
    problems = []
    for manifest in manifests:
        found, problem = _verified(root, manifest)
        if found is not None:
            return found
        problems.append(f"{manifest.name}: {problem}")
    if problems:
        raise CheckpointError(
            f"no checkpoint under {root} verifies:\n"
            + "\n".join(f"  - {line}" for line in problems)
            + f"\nRestore the files from a backup, or remove {root} to start the training again from step 0."
        )
    return None


def set_aside_after(root: Path, step: int) -> None:
    """Rename the manifests of later steps than `step`, the newest that verifies: they are damaged, and their names are needed again."""
    for manifest in root.glob("step-*.json"):
        if manifest.stem > tag_of(step):
            manifest.rename(manifest.with_suffix(".damaged"))


def retain(root: Path, keep: int) -> None:
    """Delete all but the `keep` newest commits, and directories that no commit ever named. Manifests go first: never half a commit."""
    kept = {manifest.stem for manifest in sorted(root.glob("step-*.json"))[-keep:]}
    for manifest in root.glob("step-*.json"):
        if manifest.stem not in kept:
            manifest.unlink()
    for folder in root.glob("step-*"):
        if folder.is_dir() and folder.name not in kept:
            shutil.rmtree(folder)


def _verified(root: Path, manifest: Path) -> tuple[Commit | None, str]:
    """The commit of a manifest, or why it cannot be had."""
    try:
        found = _parsed(manifest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return None, f"the manifest cannot be read ({error})"
    if manifest.stem != tag_of(found.step):
        return None, f"the manifest is of step {found.step}"
    folder = (root / manifest.stem).resolve()
    for name, expected in found.files.items():
        try:
            problem = _problem_with(folder, name, expected)
        except (OSError, ValueError) as error:
            problem = f"{name} cannot be read ({error})"
        if problem:
            return None, problem
    return found, ""


def _parsed(manifest: Path) -> Commit:
    whole = json.loads(manifest.read_text(encoding="utf-8"))
    values = whole["commit"]
    if whole["xxh3"] != _digest_of(values):
        raise ValueError("its checksum differs")
    files = {str(name): (int(size), str(digest)) for name, (size, digest) in values["files"].items()}
    if not files:
        raise ValueError("it names no file")
    return Commit(int(values["step"]), int(values["world_size"]), int(values["zero_stage"]), str(values["fingerprint"]), files)


def _digest_of(values: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True, separators=(",", ":")).encode("ascii"))


def _problem_with(folder: Path, name: str, expected: tuple[int, str]) -> str:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        return f"the manifest names {name}, which is outside of the checkpoint"
    if not path.is_file():
        return f"{name} is missing"
    if _digest(path) != expected:
        return f"{name} is not what was committed (size or checksum differs)"
    return ""


def _digest(path: Path) -> tuple[int, str]:
    hasher, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
            size += len(block)
    return size, hasher.hexdigest()


def _publish(path: Path, text: str) -> None:
    """Create-only and whole: the text is durable under another name before its own name exists."""
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    with staged.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(staged, path)
    except FileExistsError:
        raise CheckpointError(f"{path} exists already: two runs write to the same directory; give each its own --run-dir") from None
    finally:
        staged.unlink()
