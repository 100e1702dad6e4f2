"""Where a figure comes from: the machine, the versions, the commit and the command, so that it can
be measured again."""

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_OURS = ("stillhouse", "torch", "deepspeed", "ray", "transformers", "numpy", "obstore")
_VERSIONED = (*_OURS, "distillkit", "trl")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a measurement depends on beside its own settings."""

    command: str
    started: str  # UTC
    processor: str
    num_cores: int  # that this process may use
    memory_gib: float
    system: str
    python: str
    # of the packages that are installed; not every benchmark needs them all
    versions: dict[str, str]
    # of the checkout that the code runs from, '+' behind it where files differ from it; None
    # outside of one
    commit: str | None
    load_average: float  # of the minute before the measurement: processes that wanted to run

    @classmethod
    def of(cls, command: str) -> "Provenance":
        return cls(
            command=command,
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            processor=_processor(),
            num_cores=_num_cores(),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            system=platform.platform(),
            python=platform.python_version(),
            versions={name: found for name in _VERSIONED if (found := _version(name)) is not None},
            commit=_commit(Path(__file__).parent),
            load_average=round(os.getloadavg()[0], 2),
        )


def _num_cores() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if head and changed else head
