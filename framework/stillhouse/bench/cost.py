"""What a piece of work costs: time of its processor, and memory beyond what it is given and what it
returns.

Ways to do the same work are timed in turn, on the same inputs, with fresh ones for every repeat:
what slows the machine for a while slows them all, so a ratio is taken within a repeat. While they
are timed, malloc keeps what is freed (see `allocator`). Memory is measured in a fresh process,
where little else has left room to use.
"""

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
from torch import Tensor

from stillhouse.bench.allocator import freed_memory_kept
from stillhouse.bench.figures import Spread
from stillhouse.errors import ConfigError

_Made = TypeVar("_Made")

Work = Callable[[], Sequence[Tensor]]
"""Does the work, and returns what comes of it."""

# libraries load and compile in the first; after three, malloc holds all the memory that a round
# takes
_UNTIMED_ROUNDS = 3
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each way, repeat by repeat: of the process on the CPU, of the device's own clock
    on CUDA."""

    seconds: Mapping[str, Sequence[float]]
    # what malloc did with freed memory meanwhile; empty where the ways share no process
    allocator: str = ""

    def of(self, way: str) -> Spread:
        return Spread.of(self.seconds[way])

    def ratio(self, way: str, other: str) -> Spread:
        """The ratio of the seconds of two ways, taken within each repeat."""
        pairs = zip(self.seconds[way], self.seconds[other], strict=True)
        return Spread.of(ours / theirs for ours, theirs in pairs)


class Cost(NamedTuple):
    """Processor time of this process and of all that it started, and wall clock."""

    cpu_s: float
    wall_s: float


def cost_of(work: Callable[[], _Made]) -> tuple[_Made, Cost]:
    """What comes of doing the work once, and its cost."""
    cpu_s, began = _cpu_s(), perf_counter()
    made = work()
    return made, Cost(_cpu_s() - cpu_s, perf_counter() - began)


def _cpu_s() -> float:
    """Seconds of processor time of this process and its descendants, so far."""
    others = [each.cpu_times() for each in psutil.Process().children(recursive=True)]
    return process_time() + float(sum(each.user + each.system for each in others))


def require_device(name: str) -> None:
    """Raises ConfigError where torch does not find the device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device is cuda, but torch finds no such device; choose cpu, or run where "
            "nvidia-smi shows a GPU"
        )


def time_in_turn(
    works_of: Callable[[int], Mapping[str, Work]], *, repeats: int, device: torch.device
) -> Timings:
    """Time all of `works_of(repeat)` for each repeat from 1 on, after untimed rounds of number
    0."""
    numbers = [0] * _UNTIMED_ROUNDS + list(range(1, repeats + 1))
    with freed_memory_kept() as allocator:
        rounds = [
            {way: _seconds(work, device) for way, work in works_of(number).items()}
            for number in numbers
        ]
    timed = rounds[_UNTIMED_ROUNDS:]
    return Timings({way: [one[way] for one in timed] for way in timed[0]}, allocator)


def extra_bytes(
    make: Callable[[Any, str], Work], given: Any, ways: Sequence[str], *, device: torch.device
) -> dict[str, int]:
    """The most memory that each way takes at any time, beyond its inputs and what it returns, one
    after the other in a fresh process.

    `make(given, way)` is called there, and its work done twice: once for what libraries load,
    compile and keep, once to be measured. On the CPU that is the peak of the process's resident
    memory, on CUDA the peak of torch's allocator.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return {way: pool.submit(_measure, make, given, way, device).result() for way in ways}


def _measure(make: Callable[[Any, str], Work], given: Any, way: str, device: torch.device) -> int:
    torch.set_num_threads(1)
    return extra_bytes_of(make(given, way), device)


def extra_bytes_of(work: Work, device: torch.device) -> int:
    """The same of one work in this process: exact on CUDA, where torch's allocator counts."""
    work()
    before = _start_of_peak(device)
    returned = work()
    return _peak(device) - before - sum(tensor.nbytes for tensor in returned)


def _seconds(work: Work, device: torch.device) -> float:
    if device.type != "cuda":
        began = process_time()
        work()
        return process_time() - began
    began_event, ended_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began_event.record()
    work()
    ended_event.record()
    torch.cuda.synchronize(device)
    elapsed_ms: float = began_event.elapsed_time(ended_event)
    return elapsed_ms / 1000


def _start_of_peak(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not _STATUS.is_file():
        return _peak(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what was freed goes back to the system, so that taking it again counts
    _RESET.write_text("5")  # the peak of resident memory begins anew
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        return _resident("VmHWM")
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def _resident(field: str) -> int:
    (kib,) = (
        line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:")
    )
    return int(kib) * 1024
