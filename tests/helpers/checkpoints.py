"""Small checkpoints, written as ranks write them: files, parts, commit."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from stillhouse.checkpoint.integrity import Digest
from stillhouse.checkpoint.manifest import (
    Commit,
    Origin,
    folder_of,
    publish,
    publish_part,
    read_part,
)
from stillhouse.checkpoint.snapshot import Snapshot
from stillhouse.store.object_store import Blobs

ORIGIN = Origin(zero_stage=3, fingerprint="ab" * 32, settings={"seed": 0, "betas": [0.9, 0.95]})
# ".bin": a rank opens what ends in ".pt" before it restores
FILES = {
    "model_states.bin": b"weights" * 100,
    "pp_rank_0_optim.bin": b"moments" * 50,
    "pp_rank_1_optim.bin": b"",
    "empty": b"x",
}


def _write(data: bytes, write: Callable[[bytes], None]) -> None:
    write(data)


def write_files(url: str, step: int, *, attempt: str = "a", world_size: int = 2) -> str:
    """What all ranks write before the commit; rank 0 has all the files. Returns the folder."""
    blobs, folder = Blobs(url), folder_of(step, attempt)
    written = {}
    for name, data in FILES.items():
        whole = data + str(step).encode() if data else data
        digest = Digest()
        digest.add(whole)
        written[name] = digest.value
        blobs.stream(f"{folder}/{name}", partial(_write, whole))
    for rank in range(world_size):
        publish_part(
            blobs, folder, rank=rank, world_size=world_size, files=written if rank == 0 else {}
        )
    return folder


def commit_files(
    url: str, step: int, *, attempt: str = "a", world_size: int = 2, origin: Origin = ORIGIN
) -> Commit:
    """Rank 0's last step."""
    blobs, folder = Blobs(url), folder_of(step, attempt)
    parts = [
        read_part(blobs, folder, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    return publish(
        blobs,
        Commit(
            step,
            attempt,
            world_size,
            origin,
            {name: digest for part in parts for name, digest in part.items()},
        ),
    )


def make(url: str | Path, *steps: int, attempt: str = "a", origin: Origin = ORIGIN) -> list[Commit]:
    """Committed checkpoints of these steps."""
    made = []
    for step in steps:
        write_files(str(url), step, attempt=attempt)
        made.append(commit_files(str(url), step, attempt=attempt, origin=origin))
    return made


def snapshot_of(step: int, *, num_floats: int = 10, rank: int = 0) -> Snapshot:
    """A snapshot of one file."""
    state = {"weights": torch.full((num_floats,), float(step)), "step": step}
    return Snapshot(
        step, {f"pp_rank_{rank}_optim.pt": state}, began=0.0, blocking_s=0.25, release=lambda: None
    )


def commit_weights(url: str, model: nn.Module, step: int) -> Commit:
    """A commit of a language model, as far as an export reads it: the file in which rank 0 saves
    the whole module up to stage 2."""
    blobs, folder, buffer = Blobs(url), folder_of(step, "a"), io.BytesIO()
    torch.save(
        {"module": {f"lm.{name}": weight for name, weight in model.state_dict().items()}}, buffer
    )
    digest = Digest()
    digest.add(buffer.getvalue())
    blobs.stream(f"{folder}/mp_rank_00_model_states.pt", lambda write: write(buffer.getvalue()))
    origin = replace(ORIGIN, zero_stage=1)
    return publish(
        blobs, Commit(step, "a", 1, origin, {"mp_rank_00_model_states.pt": digest.value})
    )
