"""The one place where Triton kernels are launched, the teacher's and the student's, and which
failures of a launch may pass."""

import errno
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_PASSING_ERRORS = (
    torch.OutOfMemoryError,
    MemoryError,
    TimeoutError,
    InterruptedError,
    subprocess.TimeoutExpired,
)
_PASSING_NUMBERS = {
    errno.EAGAIN,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
}


def run_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: object,
    device_of: Callable[[Tensor], AbstractContextManager[object]] = torch.cuda.device_of,
    **options: Any,
) -> None:
    """Launch `kernel[grid](*arguments, **options)` on the device of the tensors among the
    arguments, which is one.

    Triton launches on the stream of the process's current device. Where a model is spread over
    several GPUs, its logits are on another one: a kernel that starts elsewhere does not wait for
    them, and reads what was in their memory before.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    assert {tensor.device for tensor in tensors} == {tensors[0].device}, (
        "all of a kernel's tensors are on one device"
    )
    with device_of(tensors[0]):
        kernel[grid](*arguments, **options)


def may_pass(failure: Exception) -> bool:
    """Whether the same launch may succeed later: memory, disk or processes were short, or the
    compiler was killed for want of them."""
    if isinstance(failure, subprocess.CalledProcessError):
        # ended by a signal; a compiler that cannot do it says so with a status
        return failure.returncode < 0
    short = isinstance(failure, OSError) and failure.errno in _PASSING_NUMBERS
    # Triton's driver has no class for it
    out_of_memory = isinstance(failure, RuntimeError) and "out of memory" in str(failure).lower()
    return isinstance(failure, _PASSING_ERRORS) or short or out_of_memory
