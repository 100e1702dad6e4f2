"""Launching Triton kernels: on the right device, and which failures may be transient.

Every kernel of the package, a teacher's or a student's, is launched by `run_kernel`.
"""

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
    """Launch `kernel[grid](*arguments, **options)` on the one device of the tensor arguments.

    Triton launches on the current device's stream. The logits of a model that is spread over
    several GPUs may be on another device; a kernel on the current one would not wait for them, and
    would read what their memory held before.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    assert {tensor.device for tensor in tensors} == {tensors[0].device}, (
        "all of a kernel's tensors are on one device"
    )
    with device_of(tensors[0]):
        kernel[grid](*arguments, **options)


def may_pass(failure: Exception) -> bool:
    """Whether a later launch may succeed: memory, disk or processes were short, or a signal ended
    the compiler."""
    if isinstance(failure, subprocess.CalledProcessError):
        # negative: ended by a signal; a compiler that cannot compile the kernel exits with a status
        return failure.returncode < 0
    short = isinstance(failure, OSError) and failure.errno in _PASSING_NUMBERS
    # Triton's driver raises no class of its own for it
    out_of_memory = isinstance(failure, RuntimeError) and "out of memory" in str(failure).lower()
    return isinstance(failure, _PASSING_ERRORS) or short or out_of_memory
