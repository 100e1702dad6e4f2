"""Damage as disks do it: one flipped bit, a disk that is full, one that may only be read, and one
whose power is cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stillhouse.errors import StoreError
from stillhouse.tracking import Journal, WaitEvent


def with_flipped_bit(data: bytes, place: int) -> bytes:
    """The bytes but for one bit of the byte at `place`; neighbouring bytes lose different ones."""
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def flip_bit(path: Path, place: int) -> None:
    """Flip a bit in place, in a file of the same name with another inode: a memory map of the old
    one stays as it is."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(with_flipped_bit(data, place % len(data)))


def places(num_bytes: int, *, how_many: int) -> range:
    """So many places all over a file, or every one where it has no more; its last byte is among
    them."""
    step = max(1, num_bytes // how_many)
    return range((num_bytes - 1) % step, num_bytes, step)[-how_many:]


@contextmanager
def small_disk(path: Path, *, num_bytes: int) -> Iterator[Path]:
    """A file system of its own, in memory, for as long as the block lasts. Only root may mount
    it."""
    path.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "stillhouse", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert mounting.returncode == 0, (
        f"this test fills a disk of its own, and mounting that failed: {mounting.stderr.strip()}; "
        "run it as root, in a container with the capability SYS_ADMIN"
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(ballast: Path) -> None:
    """Write a file that takes the last byte of its disk."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def leave_no_room(ballast: Path, journal: Path) -> None:
    """Fill a disk, and what is left of the last block of a journal on it."""
    fill(ballast)
    with suppress(StoreError):
        while True:
            Journal(journal).record(WaitEvent(""))


@contextmanager
def read_only(path: Path, *, at: Path) -> Iterator[Path]:
    """A directory seen at another place, where nobody may write, not even root, for as long as the
    block lasts. Only root may mount it."""
    at.mkdir()
    there = os.statvfs(
        path
    ).f_flag  # who is root in a namespace alone must keep what is forbidden already
    forbidden = [
        name for name in ("nosuid", "nodev", "noexec") if there & getattr(os, f"ST_{name.upper()}")
    ]
    command = ["mount", "-o", ",".join(["bind", "ro", *forbidden]), str(path), str(at)]
    mounting = subprocess.run(command, capture_output=True, text=True, check=False)
    assert mounting.returncode == 0, (
        "this test reads from a place where nobody may write, and mounting that failed: "
        f"{mounting.stderr.strip()}; "
        "run it as root, in a container with the capability SYS_ADMIN"
    )
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


@contextmanager
def file_system_in(image: Path, mount_point: Path) -> Iterator[Path]:
    """The ext4 file system in an image, which is made where it is missing, mounted for as long as
    the block lasts."""
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    mount_point.mkdir()
    mounting = subprocess.run(
        ["mount", "-o", "loop", str(image), str(mount_point)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert mounting.returncode == 0, (
        "this test cuts the power of a disk of its own, and mounting that failed: "
        f"{mounting.stderr.strip()}; run it as root where there "
        "are loop devices (a container needs the capability SYS_ADMIN and /dev/loop*), or leave "
        "it out with --no-machine-root"
    )
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


def cut_power(image: Path, left: Path) -> None:
    """Copy an image whose file system is in use, without a sync: what the file system has not
    written yet is lost."""
    shutil.copyfile(image, left)
