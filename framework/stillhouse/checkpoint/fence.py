"""Fencing: of the commands that use one root of checkpoints, only the owner may commit.

    <root>/owner-00000003.json     create-only; renewed by the owner alone

The owner is the command with the highest number. A command becomes the owner by creating the next
number, which one of several can do. The newest record is never deleted, so a command that finds a
higher number than its own has been replaced. Ranks may outlive their command, and may stand still
at any moment. So they check before each commit, and again before they report it.
"""

import re

from stillhouse.errors import CheckpointError
from stillhouse.store.object_store import Blobs

LAST_OWNER = 99_999_999  # of eight digits

_OWNER = re.compile(r"owner-(\d{8})\.json")


def owner_key(number: int) -> str:
    return f"owner-{number:08d}.json"


def owner_numbers(blobs: Blobs) -> list[int]:
    """The numbers of all owners that have a record, ascending; the last one is the owner."""
    return sorted(int(match[1]) for name in blobs.names() if (match := _OWNER.fullmatch(name)))


def newest_owner(blobs: Blobs) -> int:
    """The number of the owner; 0 where there was none."""
    return max(owner_numbers(blobs), default=0)


def require_owner(blobs: Blobs, number: int) -> None:
    """Raise CheckpointError where a command with a higher number than this is the owner."""
    newest = newest_owner(blobs)
    if newest > number:
        raise CheckpointError(
            f"the checkpoints under {blobs.url} belong to another command now, which "
            f"{owner_key(newest)} names: this one showed no sign of life for too long, or was "
            "thought to be gone. It commits nothing more, and what it committed before stays. End "
            "one of the two; the same command goes on from the newest commit."
        )
