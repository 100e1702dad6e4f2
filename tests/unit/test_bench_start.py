"""Benchmarks of one process start where the cluster's packages are not installed, and time all ways
with memory that malloc kept."""

import subprocess
import sys
from pathlib import Path

import stillhouse

# ours is there as source alone, without an installed package's metadata
ABSENT = (
    "ray",
    "deepspeed",
    "stillhouse",
)
STARTS = """
from pathlib import Path
from stillhouse.bench import codec, head, loss, topk
from stillhouse.bench.provenance import Provenance
codec.bench_codec(
    codec.Setting(6, 100, (4,), "cpu"), None, repeats=1, cache_dir=Path("cache"),
    command="", out=None
)
print(sorted(Provenance.of("").versions))
"""
FAULTS = """
import resource
from contextlib import nullcontext
from stillhouse.bench.allocator import freed_memory_kept

SIZE = 64 << 20

def faults_of_a_second_large_block():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * SIZE
        found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return found

def after(how):
    with how as said:
        return faults_of_a_second_large_block(), said

usual = faults_of_a_second_large_block()
kept, said = after(freed_memory_kept())
again = faults_of_a_second_large_block()
print(usual, kept, again, said)
"""


def run(script: str, *options: str, cwd: Path, path: Path) -> str:
    """What a fresh Python prints that finds packages on `path` alone."""
    environment = {
        "PYTHONPATH": str(path),
        "OMP_NUM_THREADS": "1",
        "HOME": str(cwd),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, *options, "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def packages_without(absent: tuple[str, ...], folder: Path) -> Path:
    """A directory with all that is installed here, by links, but for these packages and their
    metadata; and our source."""
    folder.mkdir()
    for package in (
        package
        for place in sys.path
        if place.endswith("site-packages")
        for package in Path(place).iterdir()
    ):
        if package.name.partition("-")[0] not in absent and not (folder / package.name).exists():
            (folder / package.name).symlink_to(package)
    (folder / "stillhouse").symlink_to(Path(stillhouse.__file__).parent)
    return folder


def test_the_benchmarks_of_one_process_start_without_ray_and_deepspeed(tmp_path: Path) -> None:
    path = packages_without(ABSENT, tmp_path / "packages")
    assert run(STARTS, "-S", cwd=tmp_path, path=path) == str(
        ["numpy", "obstore", "torch", "transformers"]
    )


def test_what_was_freed_is_taken_again_without_page_faults_and_only_while_something_is_timed(
    tmp_path: Path,
) -> None:
    usual, kept, again, *said = run(
        FAULTS, cwd=tmp_path, path=Path(stillhouse.__file__).parents[1]
    ).split()
    assert 4 * int(kept) < min(int(usual), int(again))
    assert (
        " ".join(said) == "malloc was told to keep freed memory, so that few page faults are timed"
    )
