"""Snapshots: the state of a checkpoint copied to host memory, sharing nothing with tensors that a
later step changes.

Training waits for the copy alone. Its memory is used again by the next snapshot: fresh pages cost
more than the copying.
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's files of a checkpoint, in memory. `release` gives the memory back; the tensors may
    not be read after that."""

    step: int  # optimiser steps done
    files: Mapping[str, Any]  # by name: what torch.save writes
    began: float  # by the monotonic clock
    blocking_s: float  # for which training waited
    release: Callable[[], None]


class OnDisk(NamedTuple):
    """Where the values of a tensor in float32 are, while it is swapped out."""

    path: Path
    num_values: int


class HostMemory:
    """Host tensors that are kept for the next snapshot: at most one snapshot's worth of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[tuple[str, int], Tensor] = {}

    def snapshot_of(
        self, name: str, state: Any, *, on_disk: Mapping[int, OnDisk] = MappingProxyType({})
    ) -> tuple[Any, Callable[[], None]]:
        """A deep copy of one file's state, and what releases it. Call `settle` before it is read.
        Tensors whose ids are in `on_disk` are copied there, and not into memory."""
        copier = _Copier(self, name, on_disk)
        return copier.copy(state), copier.release

    def settle(self) -> None:
        """Wait until all copies have arrived."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def take(self, slot: tuple[str, int], like: Tensor) -> Tensor:
        """A tensor of this shape and dtype that is not in use."""
        free = self._free.pop(slot, None)
        if free is not None and free.shape == like.shape and free.dtype == like.dtype:
            return free
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._device.type == "cuda")

    def give_back(self, slot: tuple[str, int], tensor: Tensor) -> None:
        self._free[slot] = tensor


class _Copier:
    """Copies one state. Tensors that share memory, such as tied weights, share it in the copy."""

    def __init__(self, memory: HostMemory, name: str, on_disk: Mapping[int, OnDisk]) -> None:
        self._memory = memory
        self._name = name
        self._on_disk = on_disk
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, value: Any) -> Any:
        if id(value) in self._on_disk:
            return _copied_on_disk(self._on_disk[id(value)])
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, dict):
            # keeps its class, and the versions that a module's state dict carries
            copied = copy.copy(value)
            for key in copied:
                copied[key] = self.copy(copied[key])
            return copied
        if type(value) in (list, tuple):
            return type(value)(self.copy(item) for item in value)
        return copy.deepcopy(value)

    def release(self) -> None:
        for slot, tensor in enumerate(self._tensors.values()):
            self._memory.give_back((self._name, slot), tensor)

    def _copy_tensor(self, value: Tensor) -> Tensor:
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in self._tensors:
            host = self._memory.take((self._name, len(self._tensors)), value)
            self._tensors[key] = host.copy_(value, non_blocking=True)
        return self._tensors[key]


def _copied_on_disk(values: OnDisk) -> Tensor:
    """A copy of the values beside their file, whose pages are in memory while they are read. It has
    no name, so its space is free again when the tensor is, or the process."""
    copied = values.path.with_suffix(".copy")
    shutil.copyfile(values.path, copied)
    tensor = torch.from_file(str(copied), size=values.num_values, dtype=torch.float32)
    copied.unlink()
    return tensor
