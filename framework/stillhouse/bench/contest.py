"""Several ways to do one job, side by side: in each round all of them get the same fresh inputs, and each is timed alone.

Time is the processor's, which a busy machine does not stretch as it does the clock, or the GPU's own. Memory is what a way has at its
peak beyond what there was before it began: inputs do not count, outputs do.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Generic, TypeVar

import torch
from rich.table import Table

from stillhouse.bench.figures import Spread

Inputs = TypeVar("Inputs")

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what the kernel takes for it


@dataclass(frozen=True, slots=True)
class Way(Generic[Inputs]):
    """One of the ways; what `work` returns is dropped."""

    name: str
    work: Callable[[Inputs], object]


@dataclass(frozen=True, slots=True)
class Found:
    """What one way took. Times are for all the work of a round."""

    name: str
    seconds: Spread
    peak_bytes: int | None  # None where the system does not tell


def contest(ways: Sequence[Way[Inputs]], fresh: Callable[[int], Inputs], *, device: torch.device, num_rounds: int) -> list[Found]:
    """Every way on `fresh(round)` in each round, after one round that is not counted, in which libraries compile and buffers grow."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    peaks: dict[str, list[int]] = {way.name: [] for way in ways}
    for number in range(-1, num_rounds):
        inputs = fresh(number)
        for way in ways:
            took, peak = _timed(way, inputs, device)
            if number >= 0:
                seconds[way.name].append(took)
                peaks[way.name] += [] if peak is None else [peak]
    return [Found(way.name, Spread.of(seconds[way.name]), max(peaks[way.name], default=None)) for way in ways]


def contest_table(title: str, found: Sequence[Found], *, num_tokens: int, baseline: str) -> Table:
    """Times a token, how many times as fast as the baseline each way is, and memory. Least and most are over the rounds."""
    table = Table(title=title)
    table.add_column("way")
    for heading in ("µs a token", "speed", "memory, MiB"):
        table.add_column(heading, justify="right")
    base = next(one for one in found if one.name == baseline).seconds.median
    for one in found:
        least, mid, most = (value / num_tokens * 1e6 for value in (one.seconds.least, one.seconds.median, one.seconds.most))
        memory = "" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.0f}"
        table.add_row(one.name, f"{mid:.3g} ({least:.3g} to {most:.3g})", f"{base / one.seconds.median:.2f} x", memory)
    return table


def _timed(way: Way[Inputs], inputs: Inputs, device: torch.device) -> tuple[float, int | None]:
    """Seconds, and the peak of memory in bytes."""
    if device.type == "cuda":
        return _timed_on_gpu(way, inputs, device)
    before = _settled_memory()
    began = process_time()
    kept = way.work(inputs)
    took = process_time() - began
    del kept
    peak = _memory("VmHWM")
    return took, None if before is None or peak is None else max(0, peak - before)


def _timed_on_gpu(way: Way[Inputs], inputs: Inputs, device: torch.device) -> tuple[float, int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    kept = way.work(inputs)
    end.record()
    torch.cuda.synchronize(device)
    del kept
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated(device) - before


def _settled_memory() -> int | None:
    """This process's resident bytes, with what it freed given back and the peak set down to them; None where the system cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except (AttributeError, OSError):
        return None
    return _memory("VmRSS")


def _memory(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if kib is None else int(kib) * 1024
