"""Held-out scores while a student learns: dense, beside its teacher, and no rank holds a teacher.

    <checkpoints root>/heldout/<16 hex digits>.safetensors

The file has a few held-out sequences, the teacher's final hidden states at their target positions,
and its head. It is written once, before the first step; ranks multiply the hidden states out, a
block of tokens at a time. The digits name all that decides its bytes, so a resumed run finds it.
Its metadata is sealed JSON with the xxh3 of the tensors.

Shapes: S sequences, L positions, T target tokens, G the teacher's hidden size, H the student's, V
vocabulary, X sums.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stillhouse.checkpoint.scratch import scratch_folder
from stillhouse.errors import StudentError
from stillhouse.logits import Head
from stillhouse.losses.score import head_logprobs, no_sums, score_sums
from stillhouse.models.batch import TokenBatch
from stillhouse.retry import DEFAULT_PATIENCE, Tell, insist
from stillhouse.sealed import opened, sealed
from stillhouse.sequence import Sequences, joined
from stillhouse.store.object_store import Blobs

_SEQUENCES = ("token_ids", "positions", "loss_mask")
_DAMAGE = (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True, eq=False)
class HeldoutTeacher:
    """What is left of a teacher on a few held-out sequences: all that it takes to score a
    student."""

    sequences: Sequences
    hidden_TG: Tensor  # final hidden states at the target positions, in row-major order
    head: Head

    def packed(self) -> bytes:
        """The bytes of its file."""
        arrays = dict(zip(_SEQUENCES, self.sequences.arrays, strict=True))
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        tensors |= {"hidden": self.hidden_TG, "weight": self.head.weight_VH}
        if self.head.bias_V is not None:
            tensors["bias"] = self.head.bias_V
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        curve = {"scale": self.head.scale, "softcap": self.head.softcap}
        metadata = sealed({**curve, "tensors": _digest(tensors)})
        return save(tensors, metadata={"stillhouse": json.dumps(metadata)})

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """From the content of its file. Raises one of _DAMAGE where it is not as it was written."""
        known = opened(json.loads(metadata["stillhouse"]))
        if known["tensors"] != _digest(tensors):
            raise ValueError("its tensors are not those that were written")
        head = Head(
            tensors["weight"],
            tensors.get("bias"),
            scale=float(known["scale"]),
            softcap=known["softcap"],
        )
        arrays = (tensors[name].numpy() for name in _SEQUENCES)
        return cls(Sequences(*arrays), tensors["hidden"], head)

    def to(self, device: torch.device) -> Self:
        """With its hidden states and its head on the device."""
        bias_V = self.head.bias_V
        head = replace(
            self.head,
            weight_VH=self.head.weight_VH.to(device),
            bias_V=None if bias_V is None else bias_V.to(device),
        )
        return replace(self, hidden_TG=self.hidden_TG.to(device), head=head)

    def batches(
        self, *, rank: int, world_size: int, size: int, block_tokens: int
    ) -> "list[HeldoutBatch]":
        """The part of one rank, in batches of `size` sequences, on the device of the hidden states.
        Every rank has as many: blanks without targets fill up."""
        # this rank's sequences, and blanks
        num_rows = -(-len(self.sequences) // world_size)
        num_rows = -(-num_rows // size) * size
        own = range(rank, len(self.sequences), world_size)
        rows = [self.sequences.select(slice(row, row + 1)) for row in own]
        blank = self.sequences.select(slice(0, 1)).without([0])
        rows += [blank] * (num_rows - len(rows))
        # the teacher's hidden states of each
        counts_S = self.sequences.loss_mask_SL.sum(axis=1, dtype=np.int64).tolist()
        hidden_S = self.hidden_TG.split(counts_S)
        device, nothing_0G = self.hidden_TG.device, self.hidden_TG[:0]
        return [
            HeldoutBatch(
                TokenBatch.of(joined(rows[first : first + size])).map(lambda each: each.to(device)),
                torch.cat([nothing_0G, *(hidden_S[row] for row in own[first : first + size])]),
                self.head,
                block_tokens,
            )
            for first in range(0, num_rows, size)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class HeldoutBatch:
    """One forward pass of one rank, to be scored."""

    tokens: TokenBatch
    teacher_TG: Tensor  # the teacher's final hidden states at the target positions
    teacher_head: Head
    block_tokens: int

    def score(self, hidden_TH: Tensor, head: Head) -> Tensor:
        """[X]: the score sums of a student with these final hidden states and this head."""
        sums_X = no_sums(hidden_TH.device)
        for first in range(0, self.tokens.num_targets, self.block_tokens):
            block = slice(first, first + self.block_tokens)
            teacher_TV = head_logprobs(self.teacher_TG[block], self.teacher_head)
            model_TV = head_logprobs(hidden_TH[block], head)
            sums_X += score_sums(teacher_TV, model_TV, self.tokens.labels_T[block])
        return sums_X


def write_heldout(blobs: Blobs, key: str, teacher: HeldoutTeacher) -> None:
    """Publish the file, whole or not at all. Raises StoreError."""
    data = teacher.packed()
    blobs.stream(key, lambda write: write(data))


def read_heldout(blobs: Blobs, key: str, *, tell: Tell) -> HeldoutTeacher:
    """The content of the file; of a directory's, memory that processes of one machine share.

    Waits while the store is unavailable, and reports that to `tell`. Raises StudentError where the
    file is absent or damaged, and StoreUnavailable at the end of the patience.
    """
    try:
        if blobs.directory is not None:
            return _opened(blobs.directory / key)
        with scratch_folder() as folder:  # its file stays readable once it is deleted
            insist(
                lambda: _download(blobs, key, folder / "heldout"),
                patience=DEFAULT_PATIENCE,
                tell=tell,
            )
            return _opened(folder / "heldout")
    except (FileNotFoundError, *_DAMAGE) as error:
        raise StudentError(
            f"{key} under {blobs.url}, which students are scored with while they learn, is "
            f"{'absent' if isinstance(error, FileNotFoundError) else f'damaged ({error})'}; remove "
            "it and give the same command again, which makes it anew"
        ) from None


def _opened(path: Path) -> HeldoutTeacher:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return HeldoutTeacher.unpacked(tensors, file.metadata())


def _download(blobs: Blobs, key: str, path: Path) -> None:
    with path.open("wb") as file:
        for piece in blobs.pieces(key):
            file.write(piece)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The xxh3 of tensors: names, shapes, dtypes and bytes."""
    hasher = xxhash.xxh3_64()
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
