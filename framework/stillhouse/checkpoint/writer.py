"""The background half of a checkpoint: one thread per rank writes a snapshot out while training
goes on.

Ranks meet only in the store: each says in a part which files it has written, and rank 0 publishes
the commit when all parts are there. So nothing here is a collective, and a rank that dies leaves a
torn checkpoint behind, which nobody ever chooses.
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
from stillhouse.checkpoint.manifest import (
    Commit,
    Digest,
    Files,
    Origin,
    folder_of,
    publish,
    publish_part,
    read_part,
    retain,
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


class _AbandonedError(Exception):
    """Nobody waits for this checkpoint any more."""


def attempt_name() -> str:
    """A name for this life of the group of ranks, the same on every rank and never given before.
    Every rank calls this."""
    return str(told(secrets.token_hex(4)))


class RankWriter:
    """Writes one rank's snapshots in the calling thread. On rank 0 it also commits them, and
    deletes all but the `keep` newest.

    While the store is unavailable it tries again without an end; `pause` waits between two tries,
    and may raise to end it. The callbacks are those of `CheckpointWriter`.
    """

    def __init__(
        self,
        blobs: Blobs,
        *,
        template: Commit,
        rank: int,
        keep: int,
        on_commit: Callable[[Commit, float, float], None],
        on_delay: Callable[[int, str], None],
        require_owner: Callable[[], None],
        clock: Callable[[], float] = monotonic,
        pause: Callable[[float], None],
    ) -> None:
        """`template`: of all commits here; step and files differ."""
        self._blobs, self._template = blobs, template
        self._rank, self._keep = rank, keep
        self._on_commit, self._on_delay = on_commit, on_delay
        self._require_owner = require_owner
        self._clock, self._pause = clock, pause
        self._step_on_time: int | None = None  # that of what is on its way, until it is late
        self.outage: tuple[float, StoreUnavailable] | None = (
            None  # since when the store is unavailable, and its words
        )

    def write(self, snapshot: Snapshot, *, blocking_s: float) -> None:
        """Return once all is committed on rank 0, and once what this rank owes to it is in the
        store elsewhere."""
        folder, self._step_on_time = folder_of(snapshot.step, self._template.attempt), snapshot.step
        try:
            files = {
                name: self._insist(partial(self._put, f"{folder}/{name}", state))
                for name, state in snapshot.files.items()
            }
        finally:
            snapshot.release()
        self._insist(
            lambda: publish_part(
                self._blobs,
                folder,
                rank=self._rank,
                world_size=self._template.world_size,
                files=files,
            )
        )
        if self._rank > 0:
            return
        everything = {
            name: digest
            for rank in range(self._template.world_size)
            for name, digest in self._part(folder, rank).items()
        }
        self._commit(
            replace(self._template, step=snapshot.step, files=everything),
            began=snapshot.began,
            blocking_s=blocking_s,
        )
        self._step_on_time = None  # it is safe: what comes now may take its time
        self._insist(self._require_owner)
        self._insist(lambda: retain(self._blobs, self._keep))

    def _commit(self, made: Commit, *, began: float, blocking_s: float) -> None:
        """Make the files a commit, and tell of it."""
        self._insist(self._require_owner)
        standing = self._insist(lambda: publish(self._blobs, made))
        # again: a commit counts only where it was there before a newer owner looked for one
        self._insist(self._require_owner)
        _log.info("step %d is committed", standing.step)
        self._on_commit(standing, self._clock() - began, blocking_s)

    def _put(self, key: str, state: Any) -> tuple[int, str]:
        stream = _Stream()
        self._blobs.stream(key, lambda write: stream.save(state, write))
        return stream.digest.value

    def _part(self, folder: str, rank: int) -> Files:
        """A rank's part, as soon as it is there."""
        pauses_s = pauses(_FIRST_PAUSE_S, last_s=_LONGEST_PAUSE_S)
        while True:
            try:
                return self._insist(
                    lambda: read_part(
                        self._blobs, folder, rank=rank, world_size=self._template.world_size
                    )
                )
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
                if self._step_on_time is not None:
                    self._on_delay(self._step_on_time, str(error))
                    self._step_on_time = None
            finally:
                self.outage = outage
            self._pause(next(pauses_s))


class CheckpointWriter:
    """Writes one rank's snapshots in a thread, one at a time, as `RankWriter` does.

    While the store is unavailable it tries again for as long as nobody waits for it; who waits gets
    StoreUnavailable at the end of the patience. Any other error is raised by whatever is asked of
    it next. Called in the thread are `on_commit(commit, seconds since the step, seconds of these
    that training stood still)` on rank 0, and `on_delay(step, why)` once for a snapshot that the
    store does not take at present.
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
        on_commit: Callable[[Commit, float, float], None],
        on_delay: Callable[[int, str], None],
        require_owner: Callable[[], None] = lambda: None,
        patience: Patience = DEFAULT_PATIENCE,
        files: FileLayer = DISK,
    ) -> None:
        """`require_owner` raises where another command has taken the checkpoints over: then rank 0
        commits, tells and deletes nothing more.

        `patience`: how long one request may be tried before `on_delay` is called, and an outage may
        last while somebody waits.
        """
        self._writer = RankWriter(
            Blobs(url, patience_s=patience.request_s, files=files),
            template=Commit(0, attempt, world_size, origin, {}),
            rank=rank,
            keep=keep,
            on_commit=on_commit,
            on_delay=on_delay,
            require_owner=require_owner,
            pause=self._pause,
        )
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
        """Whether a snapshot is on its way. Another rank may be ahead or behind: agree before you
        decide by it."""
        alive = self._thread is not None and self._thread.is_alive()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return alive

    def submit(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot, and return; while an earlier one is on its way, wait for that
        first."""
        came = monotonic()
        self.wait()
        blocking_s = snapshot.blocking_s + monotonic() - came
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, blocking_s), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is on its way: then all is committed on rank 0, and what this rank
        owes to it is in the store elsewhere.

        False where `timeout_s` was not enough. Raises StoreUnavailable once the store has been
        unavailable to this rank for the whole of its patience, counted from now at the earliest.
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
        """Abandon what is on its way, without waiting."""
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
    """What torch.save writes to: bytes are digested on their way. torch has errors of its own for
    those of a stream, so they are kept."""

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
