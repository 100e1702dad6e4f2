"""Triton kernels compiled for a GPU that need not be there: what its compiler refuses, no
interpreter would have noticed."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel by its name, the types of its arguments, and the values of its constants."""

    module: str
    name: str
    types: Mapping[str, str]
    constants: Mapping[str, object]


def machine_code_sizes(kernels: Sequence[Kernel], *, cache: Path) -> list[int]:
    """Bytes of each kernel's machine code for an H100. In a process of its own: this one may be the
    interpreter's."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_compile, kernels, cache).result()


def _compile(kernels: Sequence[Kernel], cache: Path) -> list[int]:
    os.environ["TRITON_INTERPRET"] = "0"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.cache.dir = str(cache)
    sizes = []
    for kernel in kernels:
        function = getattr(import_module(kernel.module), kernel.name)
        types = {
            name: "constexpr" if name in kernel.constants else kernel.types[name]
            for name in function.arg_names
        }
        values = {
            (function.arg_names.index(name),): value for name, value in kernel.constants.items()
        }
        compiled = triton.compile(
            ASTSource(function, types, values), target=GPUTarget("cuda", 90, 32)
        )
        sizes.append(len(compiled.asm["cubin"]))
    return sizes
