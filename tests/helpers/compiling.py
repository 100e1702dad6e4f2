"""Triton kernels compiled for a GPU that need not be there: what its compiler refuses, no
interpreter would have noticed, nor what a kernel's loads and registers are."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel by its name, the types of its arguments, and the values of its constants.

    A type may end in ":16": the argument, or the address, is a multiple of 16.
    """

    module: str
    name: str
    types: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int = 4
    enable_fp_fusion: bool = True  # a product and a sum may become one, rounded once


@dataclass(frozen=True)
class MachineCode:
    """What an H100 would run. Its instructions are read when one asks for them: to disassemble a
    kernel takes as long as to compile it."""

    binary: Path
    disassembler: Path
    registers: int  # of each thread
    stack_bytes: int  # of each thread: registers that did not suffice, and return addresses
    inexact: tuple[str, ...]  # operations that do not round each result to nearest, as in PTX

    @cached_property
    def instructions(self) -> str:
        return _output(self.disassembler, "-c", self.binary)

    @property
    def num_spills(self) -> int:
        """Loads and stores of registers that did not suffice."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.instructions))

    @property
    def num_wide_loads(self) -> int:
        """From global memory, of 16 bytes."""
        return sum(".128" in load for load in self._loads)

    @property
    def num_narrow_loads(self) -> int:
        """From global memory, of less than 4 bytes."""
        return sum(re.search(r"\.[US](8|16)\b", load) is not None for load in self._loads)

    @property
    def _loads(self) -> list[str]:
        return re.findall(r"\bLDG\.[\w.]+", self.instructions)


def machine_code(kernels: Sequence[Kernel], *, cache: Path) -> list[MachineCode]:
    """Each kernel's machine code for an H100. In a process of its own: this one may be the
    interpreter's."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_compile, kernels, cache).result()


def _compile(kernels: Sequence[Kernel], cache: Path) -> list[MachineCode]:
    os.environ["TRITON_INTERPRET"] = "0"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.cache.dir = str(cache)
    found = []
    for number, kernel in enumerate(kernels):
        # types, and what is known of the numbers
        function = getattr(import_module(kernel.module), kernel.name)
        types, attributes = {}, {}
        for place, name in enumerate(function.arg_names):
            of, _, multiple = kernel.types.get(name, "").partition(":")
            types[name] = "constexpr" if name in kernel.constants else of
            if multiple and name not in kernel.constants:
                attributes[(place,)] = [["tt.divisibility", int(multiple)]]
        values = {
            (function.arg_names.index(name),): value for name, value in kernel.constants.items()
        }

        # machine code, and what NVIDIA's tools, which come with Triton, say of it
        compiled = triton.compile(
            ASTSource(function, types, values, attributes),
            target=GPUTarget("cuda", 90, 32),
            options={
                "num_warps": kernel.num_warps,
                "enable_fp_fusion": kernel.enable_fp_fusion,
            },
        )
        binary = cache / f"{number}.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = _output(tools / "cuobjdump", "-res-usage", binary)
        registers, stack_bytes = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
        inexact = re.findall(r"\b(?:fma|div\.full|\w+\.approx)\S*", compiled.asm["ptx"])
        found.append(
            MachineCode(
                binary, tools / "nvdisasm", int(registers), int(stack_bytes), tuple(inexact)
            )
        )
    return found


def _output(*command: object) -> str:
    words = list(map(str, command))
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
