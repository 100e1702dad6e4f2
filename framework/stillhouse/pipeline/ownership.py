"""One command at a time: the lock of a run directory, and the ownership of a place of checkpoints,
which may be a bucket.

    <run directory>/lock                      locked by the kernel (flock) while the command runs;
                                              its text names the holder
    <place of checkpoints>/owner-00000003.json
                                              the owner, renewed every few seconds; the next owner
                                              creates the next number

A kill frees the lock at once. On its own machine, an owner that was killed is known to be gone. On
others it counts as gone when its record has not changed for `Lease.lease_s` by the watcher's clock,
so that no two clocks are compared.
"""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Self

from stillhouse import atomic
from stillhouse.checkpoint.fence import (
    LAST_OWNER,
    newest_owner,
    owner_key,
    owner_numbers,
    require_owner,
)
from stillhouse.errors import CheckpointError, ConfigError, StoreError
from stillhouse.pipeline.holder import Holder, Record
from stillhouse.store.object_store import Blobs

_RENEWAL_PATIENCE_S = 5.0  # for one request; a renewal that fails is tried again


@dataclass(frozen=True, slots=True)
class Lease:
    """How long an owner may be silent."""

    lease_s: float = 60.0
    renew_every_s: float = 10.0
    look_every_s: float = 1.0  # while another's lease is waited for


@contextmanager
def locked(holder: Holder) -> Iterator[None]:
    """Lock the holder's run directory, which is made where it is not there, for as long as the
    block lasts.

    Raises ConfigError, which names the other holder, where another command holds it.
    """
    path = Path(holder.run_dir) / "lock"
    try:
        atomic.make_directory(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error.strerror}; name another --run-dir") from None
    try:
        _lock(descriptor, holder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, holder: Holder) -> None:
    text = holder.packed()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))
    except BlockingIOError:
        raise ConfigError(
            f"{holder.run_dir} is in use by {_who_locked(descriptor)}. Two commands in one run "
            "directory would overwrite each other's checkpoints: wait for that one or end it, then "
            "give this command again; or name another --run-dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{holder.run_dir} cannot be locked: {error.strerror}; name a --run-dir on a file "
            "system that has locks (flock) and room"
        ) from None


def _who_locked(descriptor: int) -> str:
    record = Record.parsed(os.pread(descriptor, 1 << 16, 0))
    # where the text still names an earlier holder, which is gone
    has_just_begun = record.holder is not None and record.holder.state() == "gone"
    return "another command, which has just begun" if has_just_begun else record.words()


class Owner:
    """The ownership of a place of checkpoints while the block lasts. A thread renews it, and notes
    where another command has taken it over."""

    def __init__(self, url: str, number: int, holder: Holder, lease: Lease) -> None:
        self.number = number
        self._blobs = Blobs(url, patience_s=_RENEWAL_PATIENCE_S)
        self._holder = holder
        self._lease = lease
        self._lost: CheckpointError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="checkpoint-owner", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        if not self.is_lost():
            with suppress(StoreError):  # then its lease runs out
                release(self._blobs, self.number, self._holder)

    def is_lost(self) -> bool:
        """Whether another command is known to have taken the checkpoints over."""
        return self._lost is not None

    def require(self) -> None:
        """Raise CheckpointError where another command has taken the checkpoints over."""
        if self._lost is not None:
            raise self._lost

    def _renew(self) -> None:
        renewal = 0
        while not self._stopped.wait(self._lease.renew_every_s):
            renewal += 1
            try:
                # a store that does not answer cannot be written by another owner either
                with suppress(StoreError):
                    renew(self._blobs, self.number, self._holder, renewal=renewal)
            except CheckpointError as error:
                self._lost = error
                return


def owned(url: str, holder: Holder, *, say: Callable[[str], None], lease: Lease = Lease()) -> Owner:
    """Become the owner of the checkpoints under `url`, as `take_over` does; to be entered at
    once."""
    return Owner(url, take_over(Blobs(url), holder, say=say, lease=lease), holder, lease)


def take_over(
    blobs: Blobs,
    holder: Holder,
    *,
    say: Callable[[str], None],
    lease: Lease,
    clock: Callable[[], float] = monotonic,
    pause: Callable[[float], None] = sleep,
) -> int:
    """Become the owner. Returns its number, which has to be renewed from now on.

    `say` shows what is waited for. Raises ConfigError where another owner is alive, which it names,
    and where no number is left.
    """
    # the number after the newest, once its owner is gone
    while True:
        newest = newest_owner(blobs)
        if newest == LAST_OWNER:
            raise ConfigError(
                f"{owner_key(newest)} under {blobs.url} has the highest number that an owner can "
                "have, so no command can follow it. No run counts that far: somebody has put it "
                "there. Delete it where no command uses these checkpoints, then give this one again"
            )
        if newest > 0:
            _await_end(blobs, newest, lease, say=say, clock=clock, pause=pause)
        number = newest + 1
        # its answer is no proof: False also where it was written and the answer was lost
        blobs.create(owner_key(number), holder.packed())
        if _is_owner(blobs, number, holder):
            break

    # earlier records serve nothing any more
    with suppress(StoreError):
        for earlier in owner_numbers(blobs)[:-1]:
            blobs.delete(owner_key(earlier))
    return number


def renew(blobs: Blobs, number: int, holder: Holder, *, renewal: int) -> None:
    """Give a heartbeat. Raises CheckpointError where another command has taken the
    checkpoints over."""
    require_owner(blobs, number)
    blobs.replace(owner_key(number), holder.packed(renewal=renewal))


def release(blobs: Blobs, number: int, holder: Holder) -> None:
    """End an ownership, so that the next command need not wait for the end of the lease."""
    blobs.replace(owner_key(number), holder.packed(released=True))


def _is_owner(blobs: Blobs, number: int, holder: Holder) -> bool:
    """Whether this number is ours, and still the newest: a slow command may create a number that
    another one had, whose record is deleted by now."""
    record = _record(blobs, number)
    return record is not None and record.holder == holder and newest_owner(blobs) == number


def _await_end(
    blobs: Blobs,
    number: int,
    lease: Lease,
    *,
    say: Callable[[str], None],
    clock: Callable[[], float],
    pause: Callable[[float], None],
) -> None:
    """Return once the owner of this number is gone, or its record is. Raises ConfigError where it
    is alive."""
    # what can be seen from here
    first = _record(blobs, number)
    if first is None or _is_over(first):
        return
    if first.holder is not None and first.holder.state() == "alive":
        raise _refusal(blobs.url, first)

    # an owner on another machine, which shows by its record that it is alive
    say(
        f"the checkpoints under {blobs.url} belong to {first.words()}; from here it cannot be seen "
        f"whether it lives, so this one waits up to {lease.lease_s:g} s for a sign of it"
    )
    deadline = clock() + lease.lease_s
    while clock() < deadline:
        pause(lease.look_every_s)
        now = _record(blobs, number)
        if now is None or _is_over(now):
            return
        if now != first:
            raise _refusal(blobs.url, now)


def _record(blobs: Blobs, number: int) -> Record | None:
    """The record of this number; None where a newer owner has deleted it."""
    try:
        return Record.parsed(bytes(blobs.read(owner_key(number))))
    except FileNotFoundError:
        return None


def _is_over(record: Record) -> bool:
    return bool(record.more.get("released")) or (
        record.holder is not None and record.holder.state() == "gone"
    )


def _refusal(url: str, record: Record) -> ConfigError:
    where = "" if record.holder is None else f" in the run directory {record.holder.run_dir}"
    return ConfigError(
        f"the checkpoints under {url} are in use by {record.words()}{where}. Two commands would "
        "commit over each other: wait for that one or end it, then give this command again; or "
        "give this run a student.checkpoint_url of its own"
    )
