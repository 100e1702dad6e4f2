"""DeepSpeed's op for reads and writes of swapped states, in Python: its own is compiled at first
use, which takes minutes and libaio's headers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from torch import Tensor

from helpers.training import train_and_tell
from stillhouse.student.job import TrainJob
from stillhouse.tracking import TrainEvent


class _Handle:
    """Each request is done at once; the buffers are the pinned ones."""

    def __init__(self, **_options: Any) -> None:
        self._buffers: list[tuple[int, int]] = []
        self._num_done = 0

    def new_cpu_locked_tensor(self, num_values: int, like: Tensor) -> Tensor:
        buffer = torch.empty(num_values, dtype=like.dtype)
        self._buffers.append((buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes))
        return buffer

    def free_cpu_locked_tensor(self, _buffer: Tensor) -> bool:
        return True

    def is_pinned(self, tensor: Tensor) -> bool:
        return any(start <= tensor.data_ptr() < stop for start, stop in self._buffers)

    def async_pread(self, buffer: Tensor, path: str, _offset: int) -> int:
        buffer.copy_(torch.from_numpy(np.fromfile(path, np.float32, count=buffer.numel())))
        self._num_done += 1
        return 0

    def async_pwrite(self, buffer: Tensor, path: str, _offset: int) -> int:
        Path(path).write_bytes(buffer.numpy().tobytes())
        self._num_done += 1
        return 0

    def wait(self) -> int:
        num_done, self._num_done = self._num_done, 0
        assert num_done > 0, "DeepSpeed's own ends the process here"
        return num_done


def train_swapped(job: TrainJob) -> list[TrainEvent]:
    """As `train_and_tell`, with this op in the place of DeepSpeed's."""
    OpBuilder._loaded_ops["async_io"] = SimpleNamespace(aio_handle=_Handle)
    return train_and_tell(job)
