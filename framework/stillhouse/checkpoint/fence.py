"""Which command may commit in a place of checkpoints: the owner with the highest number.

    <root>/owner-00000003.json     created once, by who becomes the owner; renewed by that command
    alone

Ownership is taken by creating the next number, which one of several can do, and the newest is never
deleted. So whoever sees a higher number than its own has been replaced. A group of ranks looks
before each commit, for it may have outlived its command, and once more before it tells of the
commit: it may have stood still in between.
"""

import re

from stillhouse.errors import CheckpointError
from stillhouse.store.object_store import Blobs

LAST_OWNER = 99_999_999  # of eight digits

_OWNER = re.compile(r"owner-(\d{8})\.json")


def owner_key(number: int) -> str:
    return f"owner-{number:08d}.json"


def owner_numbers(blobs: Blobs) -> list[int]:
    """The owners whose records are there, oldest first; the last one is the owner."""
    return sorted(int(match[1]) for name in blobs.names() if (match := _OWNER.fullmatch(name)))


def newest_owner(blobs: Blobs) -> int:
    """The number of the owner; 0 where there was none."""
    return max(owner_numbers(blobs), default=0)


def require_owner(blobs: Blobs, number: int) -> None:
    """Raise CheckpointError where another command has become the owner since."""
    newest = newest_owner(blobs)
    if newest > number:
        raise CheckpointError(
            f"the checkpoints under {blobs.url} belong to another command now, which "
            f"{owner_key(newest)} names: this one showed no sign of "
            "life for too long, or was thought to be gone. It commits nothing more, and what it "
            "committed before stays. "
            "End one of the two; the same command goes on from the newest commit."
        )
