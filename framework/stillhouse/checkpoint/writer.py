"""The asynchronous half of a checkpoint: one thread a rank writes a snapshot to the store while
training goes on.

Ranks meet in the store alone. Each publishes a part, which lists its files, and rank 0 publishes
the manifest when all parts are there. Nothing here is a collective: a rank that is killed leaves a
torn checkpoint, which is never chosen.
"""

import logging
import math
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import IO, Any, Self, TypeVar, cast

import torch

from stillhouse.atomic import DISK, FileLayer
from stillhouse.checkpoint.choice import retain
from stillhouse.checkpoint.integrity import Digest
from stillhouse.checkpoint.manifest import (
    Commit,
    Files,
    Origin,
    folder_of,
    publish,
    publish_part,
    read_part,
)
from stillhouse.checkpoint.snapshot import Snapshot
from stillhouse.cluster.collectives import told
from stillhouse.errors import StoreError, StoreUnavailable
from stillhouse.retry import DEFAULT_PATIENCE, Patience, given_up, pauses
from stillhouse.store.object_store import Blobs

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 2.0
_LOOK_EVERY_S = 0.5

OnCommit = Callable[[Commit, float, float], None]
"""Called with a commit, the seconds since its step, and those of them for which training waited."""

OnDelay = Callable[[int, str], None]
"""Called with a step and the store's error, once for a snapshot that the store does not take at
present."""


BestUntil = Callable[[int], int | None]
"""The step up to this one whose commit has to be kept, however old it is; None: none has to."""


def _no_best(_step: int) -> None:
    return None


class _AbandonedError(Exception):
    """The checkpoint is not waited for any more."""


def attempt_name() -> str:
    """A new name for this life of the group of ranks, the same on every rank. A collective."""
    return str(told(secrets.token_hex(4)))


class RankWriter:
    """Writes one rank's snapshots in the calling thread. On rank 0 it also commits them, and
    deletes all commits but the `keep` newest and the best one.

    While the store is unavailable it tries again without an end; `pause` waits between two tries,
    and may raise to end it.
    """

    def __init__(
        self,
        blobs: Blobs,
        *,
        template: Commit,
        rank: int,
        keep: int,
        on_commit: OnCommit,
        on_delay: OnDelay,
        require_owner: Callable[[], None],
        best_until: BestUntil = _no_best,
        clock: Callable[[], float] = monotonic,
        pause: Callable[[float], None],
    ) -> None:
        """`template`: any commit of this attempt; step and files are replaced. `require_owner`
        raises where another command owns the checkpoints: then rank 0 commits, reports and deletes
        nothing more. `best_until`: the best step among those up to the one that it is given, if one
        has to be kept."""
        self._blobs, self._template = blobs, template
        self._rank, self._keep = rank, keep
        self._on_commit, self._on_delay = on_commit, on_delay
        self._require_owner, self._best_until = require_owner, best_until
        self._clock, self._pause = clock, pause
        self._undelayed_step: int | None = None  # being written, and no delay of it reported yet
        # since when the store is unavailable, and its error
        self.outage: tuple[float, StoreUnavailable] | None = None

    def write(self, snapshot: Snapshot, *, blocking_s: float) -> None:
        """Return once the snapshot is committed (rank 0), or this rank's part of it published."""
        # this rank's files and part
        template, folder = self._template, folder_of(snapshot.step, self._template.attempt)
        self._undelayed_step = snapshot.step
        try:
            files = {
                name: self._insist(partial(self._put, f"{folder}/{name}", state))
                for name, state in snapshot.files.items()
            }
        finally:
            snapshot.release()
        publish_own = partial(publish_part, rank=self._rank, world_size=template.world_size)
        self._insist(partial(publish_own, self._blobs, folder, files=files))
        if self._rank > 0:
            return
        # the commit, of all ranks' files
        everything: dict[str, tuple[int, str]] = {}
        for rank in range(template.world_size):
            everything |= self._part(folder, rank)
        commit = replace(template, step=snapshot.step, files=everything)
        self._commit(commit, began=snapshot.began, blocking_s=blocking_s)
        # what is older; a delay of this is not reported
        self._undelayed_step = None
        self._insist(self._require_owner)
        best = self._best_until(snapshot.step)
        self._insist(lambda: retain(self._blobs, self._keep, best=best))

    def _commit(self, commit: Commit, *, began: float, blocking_s: float) -> None:
        """Publish the commit, and report it."""
        self._insist(self._require_owner)
        standing = self._insist(lambda: publish(self._blobs, commit))
        # again: a commit counts only where it was there before a newer owner looked for one
        self._insist(self._require_owner)
        _log.info("step %d is committed", standing.step)
        self._on_commit(standing, self._clock() - began, blocking_s)

    def _put(self, key: str, state: Any) -> tuple[int, str]:
        stream = _Stream()
        self._blobs.stream(key, lambda write: stream.save(state, write))
        return stream.digest.value

    def _part(self, folder: str, rank: int) -> Files:
        """A rank's part, as soon as it is published."""
        pauses_s = pauses(_FIRST_PAUSE_S, last_s=_LONGEST_PAUSE_S)
        world_size = self._template.world_size
        read = partial(read_part, self._blobs, folder, rank=rank, world_size=world_size)
        while True:
            try:
                return self._insist(read)
            except FileNotFoundError:
                self._pause(next(pauses_s))

    def _insist(self, call: Callable[[], _Answer]) -> _Answer:
        """Call until the store is available."""
        pauses_s = pauses(_FIRST_PAUSE_S, last_s=_LONGEST_PAUSE_S)
        while True:
            outage = None
            try:
                return call()
            except StoreUnavailable as error:
                _log.info("a checkpoint cannot be written yet: %s", error)
                outage = (self.outage[0] if self.outage is not None else self._clock(), error)
                if self._undelayed_step is not None:
                    self._on_delay(self._undelayed_step, str(error))
                    self._undelayed_step = None
            finally:
                self.outage = outage
            self._pause(next(pauses_s))


class CheckpointWriter:
    """Writes one rank's snapshots in a thread, one at a time, as `RankWriter` does. Both callbacks
    are called in the thread, `on_commit` on rank 0 alone.

    While the store is unavailable it tries again for as long as no caller waits for it; a waiting
    caller gets StoreUnavailable at the end of the patience. Any other error is raised by the
    next method that is called.
    """

    def __init__(
        self,
        url: str,
        *,
        origin: Origin,
        attempt: str,
        rank: int,
        world_size: int,
        keep: int,
        on_commit: OnCommit,
        on_delay: OnDelay,
        require_owner: Callable[[], None] = lambda: None,
        best_until: BestUntil = _no_best,
        patience: Patience = DEFAULT_PATIENCE,
        files: FileLayer = DISK,
    ) -> None:
        """`patience`: how long one request may be tried before `on_delay` is called, and an outage
        may last while a caller waits."""
        self._writer = RankWriter(
            Blobs(url, patience_s=patience.request_s, files=files),
            template=Commit(0, attempt, world_size, origin, {}),
            rank=rank,
            keep=keep,
            on_commit=on_commit,
            on_delay=on_delay,
            require_owner=require_owner,
            best_until=best_until,
            pause=self._pause,
        )
        # the thread that it writes in, one for each snapshot
        self._end_after_s = patience.end_after_s
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written by this rank. Other ranks may be ahead or behind:
        agree before you decide by it."""
        alive = self._thread is not None and self._thread.is_alive()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return alive

    def submit(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot, and return. Waits first while an earlier one is being
        written."""
        came = monotonic()
        self.wait()
        blocking_s = snapshot.blocking_s + monotonic() - came
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, blocking_s), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was submitted is committed (rank 0), or this rank's parts of it
        published. False where `timeout_s` was not enough.

        Raises StoreUnavailable once the store has been unavailable to this rank for the whole of
        its patience, counted from now at the earliest.
        """
        began = monotonic()
        deadline = math.inf if timeout_s is None else began + timeout_s
        while self._thread is not None and self._thread.is_alive() and monotonic() < deadline:
            self._thread.join(min(_LOOK_EVERY_S, max(deadline - monotonic(), 0.0)))
            outage = self._writer.outage
            if outage is not None and monotonic() - max(outage[0], began) >= self._end_after_s:
                self.close()
                raise given_up(outage[1], self._end_after_s)
        return not self.busy

    def close(self) -> None:
        """Abandon what is being written, without waiting."""
        self._abandoned.set()

    def _run(self, snapshot: Snapshot, blocking_s: float) -> None:
        try:
            self._writer.write(snapshot, blocking_s=blocking_s)
        except _AbandonedError:
            pass
        except BaseException as error:
            self._error = error

    def _pause(self, pause_s: float) -> None:
        if self._abandoned.wait(pause_s):
            raise _AbandonedError


class _Stream:
    """The file that torch.save writes to: bytes are digested on their way to the store. torch
    replaces an error of the stream by one of its own, so it is kept, and raised in its place."""

    def __init__(self) -> None:
        self.digest = Digest()
        self._error: StoreError | None = None
        self._out: Callable[[bytes | memoryview], None]

    def save(self, state: Any, out: Callable[[bytes | memoryview], None]) -> None:
        self._out = out
        try:
            torch.save(state, cast("IO[bytes]", self))
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: memoryview) -> int:
        self.digest.add(data)
        try:
            self._out(data)
        except StoreError as error:
            self._error = error
            raise
        return len(data)

    def flush(self) -> None:
        """torch calls it; the store's own buffer is written when it is closed."""
