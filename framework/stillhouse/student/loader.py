"""From chunks to micro-batches: a rank reads only its own rows, verifies them, and decodes them
ahead of the step that needs them.

The loader has no state but the step: what it yields is a pure function of (order, step, rank, world
size). A chunk that is not there yet is waited for, as is a store that does not answer, but that not
for ever; a damaged chunk is reported, and waited for until it has been replaced.

Shapes: B sequences, L positions, T target tokens.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import ChunkError, StudentError
from stillhouse.logits import CompressedLogits, decode
from stillhouse.models.batch import TokenBatch
from stillhouse.retry import DEFAULT_PATIENCE, Outage, Patience, Tell, pauses
from stillhouse.sequence import Sequences, joined
from stillhouse.store import Chunk, ChunkMissing, ChunkStore, StoreUnavailable
from stillhouse.student.order import Order, rank_rows

_FIRST_POLL_S, _LAST_POLL_S = 0.05, 1.0
# a chunk that is not there, or damaged, for so long is reported (again): it may have been deleted,
# the report lost
_MISSED_S = 30.0
_LOOK_UP_S, _CLOSE_S = 0.2, 2.0
_PADDING = -1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass of one rank."""

    tokens: TokenBatch
    target: CompressedLogits

    def map(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The same batch with `change` applied to each of its tensors."""
        return MicroBatch(self.tokens.map(change), self.target.map(change))

    def to(self, device: torch.device) -> "MicroBatch":
        """On the device. From pinned memory to a GPU this does not wait for the copy."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class LoaderState:
    """All that a checkpoint needs to find the next batch again."""

    step: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank trains on in one optimiser step."""

    state: LoaderState
    micro_batches: tuple[MicroBatch, ...]
    sequences: tuple[int, ...]  # of all ranks, to name them when the step goes wrong


class BatchReader:
    """Reads the batches of steps [start, stop) in a background thread, `prefetch` of them ahead.
    Use it as a context manager.

    With `pin_memory` that thread leaves them in page-locked memory, from which a GPU takes them
    without its process waiting. An outage of the store is told to `on_outage` and ends the reading
    with StoreUnavailable, both as `patience` says.

    `on_read` hears of each read from a directory: the chunk's number, then None. The system may
    never return from one, whereas a request to an object store has its limits.
    """

    def __init__(
        self,
        store: ChunkStore,
        order: Order,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        start: int,
        stop: int,
        prefetch: int,
        on_bad_chunk: Callable[[int], None],
        on_outage: Tell,
        on_read: Callable[[int | None], None] = lambda _chunk: None,
        pin_memory: bool = False,
        missed_s: float = _MISSED_S,
        patience: Patience = DEFAULT_PATIENCE,
    ):
        self._store, self._order = store, order
        self._rank, self._world_size, self._micro_batch = rank, world_size, micro_batch
        self._start, self._stop = start, stop
        self._on_bad_chunk = on_bad_chunk
        self._on_read = on_read if store.blobs.directory is not None else lambda _chunk: None
        self._pin_memory, self._missed_s = pin_memory, missed_s
        self._outage = Outage(patience, tell=on_outage)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="batch-reader", daemon=True)

    def __enter__(self) -> "BatchReader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The thread ends by itself; while a store that does not answer holds it, nobody waits for
        that."""
        self._closed.set()
        deadline = time.monotonic() + _CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._drain()
            self._thread.join(timeout=0.05)

    def next(self) -> tuple[Batch, float]:
        """The next batch, and the seconds for which the caller waited for it. Raises what the
        reading thread met."""
        began = time.monotonic()
        found = self.next_unless(lambda: False)
        assert found is not None
        return found, time.monotonic() - began

    def next_unless(self, interrupted: Callable[[], bool]) -> Batch | None:
        """The next batch, or None once there is something better to do than to wait for it. Raises
        what the reading thread met."""
        while True:
            try:
                found = self._queue.get(timeout=_LOOK_UP_S)
            except queue.Empty:
                if interrupted():
                    return None
                continue
            if isinstance(found, BaseException):
                raise found
            return found

    def _read_ahead(self) -> None:
        try:
            for batch in self._batches():
                self._put(batch)
        except _ClosedError:
            return
        except BaseException as error:
            self._put(error)

    def _put(self, found: Batch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(found, timeout=0.2)
            except queue.Full:
                continue
        return None

    def _drain(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()

    def _batches(self) -> Iterator[Batch]:
        """Rows are fetched a stretch of steps at a time: the steps that share one window of
        chunks."""
        stretch = steps_in_a_stretch(self._order)
        for first in range(self._start, self._stop, stretch):
            steps = range(first, min(first + stretch, self._stop))
            rows_by_step = [self._rows_of(step) for step in steps]
            rows = self._fetch(np.unique(np.concatenate([rows.ravel() for rows in rows_by_step])))
            for step, rows_AB in zip(steps, rows_by_step, strict=True):
                try:
                    micro_batches = tuple(self._decode(rows_B, rows) for rows_B in rows_AB)
                except ChunkError:  # as it was published, but published wrong
                    rows |= self._fetch(rows_AB.ravel(), decoding=True)
                    micro_batches = tuple(self._decode(rows_B, rows) for rows_B in rows_AB)
                yield Batch(
                    LoaderState(step), micro_batches, tuple(self._order.sequences(step).tolist())
                )

    def _rows_of(self, step: int) -> np.ndarray:
        """[A, B] sequence numbers of this rank's A micro-batches, padded; A is the same for every
        step and rank."""
        sequences = self._order.sequences(step)
        whole = np.full(self._order.global_batch_sequences, _PADDING, dtype=np.int64)
        whole[: len(sequences)] = sequences
        return rank_rows(
            whole, rank=self._rank, world_size=self._world_size, micro_batch=self._micro_batch
        )

    def _fetch(self, sequences: np.ndarray, *, decoding: bool = False) -> dict[int, Chunk]:
        """Each wanted sequence as a chunk of one row. `decoding` its records as well makes sure of
        a chunk before it is believed."""
        sequences = sequences[sequences != _PADDING]
        numbers, rows = np.divmod(sequences, self._order.chunk_sequences)
        found: dict[int, Chunk] = {}
        for number in np.unique(numbers):
            wanted = rows[numbers == number]
            chunk = self._fetch_when_there(int(number), wanted, decoding=decoding)
            for index, row in enumerate(wanted):
                found[int(number) * self._order.chunk_sequences + int(row)] = chunk.row(index)
        return found

    def _fetch_when_there(self, number: int, rows: np.ndarray, *, decoding: bool) -> Chunk:
        pauses_s = pauses(_FIRST_POLL_S, last_s=_LAST_POLL_S)
        reported_at, missing_since = -np.inf, time.monotonic()
        while not self._closed.wait(0):
            try:
                chunk = self._read(number, rows)
                if decoding:
                    decode(torch.from_numpy(chunk.targets_NB), self._store.recipe.spec)
                self._outage.is_over()
                return chunk
            except ChunkMissing:
                self._outage.is_over()
                reported_at = -np.inf  # taken away: what comes in its place is another chunk
                if time.monotonic() - missing_since > self._missed_s:
                    self._on_bad_chunk(number)
                    missing_since = time.monotonic()
            except StoreUnavailable as error:
                self._outage.goes_on(error)
            except ChunkError:
                self._outage.is_over()
                if (
                    time.monotonic() - reported_at > self._missed_s
                ):  # or it was lost with the coordinator's process
                    self._on_bad_chunk(number)
                    reported_at = time.monotonic()
            self._closed.wait(next(pauses_s))
        raise _ClosedError

    def _read(self, number: int, rows: np.ndarray) -> Chunk:
        self._on_read(number)
        try:
            return self._store.fetch_rows(number, rows)
        finally:
            self._on_read(None)

    def _decode(self, sequences_B: np.ndarray, rows: dict[int, Chunk]) -> MicroBatch:
        length, spec = self._store.recipe.sequence_length, self._store.recipe.spec
        chunks = [rows[int(sequence)] for sequence in sequences_B if sequence != _PADDING]
        blanks = Sequences(
            *(
                np.zeros((len(sequences_B) - len(chunks), length), dtype)
                for dtype in (np.int32, np.int32, np.uint8)
            )
        )
        sequences = joined(
            [*(chunk.sequences for chunk in chunks), blanks.without(range(len(blanks)))]
        )
        records = [
            np.empty((0, spec.bytes_per_token), dtype=np.uint8),
            *(chunk.targets_NB for chunk in chunks),
        ]
        batch = MicroBatch(
            TokenBatch.of(sequences), decode(torch.from_numpy(np.concatenate(records)), spec)
        )
        return batch.map(Tensor.pin_memory) if self._pin_memory else batch


def steps_in_a_stretch(order: Order) -> int:
    """How many steps' rows a reader fetches together."""
    return max(1, order.window_chunks * order.chunk_sequences // order.global_batch_sequences)


def chunks_read_ahead(order: Order) -> int:
    """How far into the reading order a reader may have to see, beyond the cursor, before it can
    yield its next batch.

    A stretch begins within a group of neighbouring chunks, and among those that it runs through may
    be the group of the short chunk.
    """
    window_sequences = order.window_chunks * order.chunk_sequences
    return (-(-order.global_batch_sequences // window_sequences) + 2) * order.window_chunks


def refuse_bad_chunk(number: int) -> None:
    """For readers without a teacher pool behind them: a damaged or lost chunk ends the run, since
    nobody will replace it."""
    raise StudentError(
        f"chunk {number} in the store is damaged or gone, and no teacher is running that could "
        "replace it; "
        "`stillhouse store verify URL --repair RUN_DIR` has a teacher make damaged chunks again, "
        "`stillhouse produce` those that are gone"
    )


class _ClosedError(Exception):
    """The consumer went away while the thread was waiting."""
