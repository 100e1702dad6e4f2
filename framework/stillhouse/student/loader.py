"""The data loader of a rank: from chunks to micro-batches, read, verified and decoded ahead of the
step that needs them. A rank reads its own sequences alone.

Stateless: the batch of a step is a pure function of (order, step, rank, world size), so a training
resumes at any step, with any number of ranks.

Shapes: A micro-batches, B sequences, L positions, T target tokens.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import ChunkError
from stillhouse.logits import CompressedLogits, decode
from stillhouse.models.batch import TokenBatch
from stillhouse.retry import DEFAULT_PATIENCE, Outage, Patience, Tell
from stillhouse.sequence import Sequences, joined
from stillhouse.store import Chunk, ChunkStore
from stillhouse.student.fetching import MISSED_S, ClosedError, SequenceFetcher
from stillhouse.student.order import Order, rank_rows

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
class Batch:
    """What one rank trains on in one optimiser step."""

    step: int  # counted from 0
    micro_batches: tuple[MicroBatch, ...]
    sequences: tuple[int, ...]  # of all ranks, to name them when the step fails


class BatchReader:
    """Reads the batches of steps [start, stop) in a background thread, `prefetch` of them ahead. A
    context manager.

    With `pin_memory` they are in page-locked memory, from which a GPU copies them without its
    process waiting. An outage of the store is reported to `on_outage`, and raises StoreUnavailable
    at the end of the patience. `on_bad_chunk` and `on_read`: see `SequenceFetcher`.
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
        missed_s: float = MISSED_S,
        patience: Patience = DEFAULT_PATIENCE,
    ):
        # what this rank reads
        self._recipe, self._order, self._steps = store.recipe, order, range(start, stop)
        self._rank, self._world_size, self._micro_batch = rank, world_size, micro_batch
        self._pin_memory = pin_memory
        # the thread that reads it
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="batch-reader", daemon=True)
        self._fetcher = SequenceFetcher(
            store,
            outage=Outage(patience, tell=on_outage),
            on_bad_chunk=on_bad_chunk,
            on_read=on_read,
            missed_s=missed_s,
            closed=self._closed,
        )

    def __enter__(self) -> "BatchReader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The thread ends by itself. It is not waited for while a store that does not answer holds
        it."""
        self._closed.set()
        deadline = time.monotonic() + _CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def next_unless(self, interrupted: Callable[[], bool]) -> Batch | None:
        """The next batch, or None where `interrupted()` becomes true before it is there. Raises
        what the reading thread raised."""
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
        except ClosedError:
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

    def _batches(self) -> Iterator[Batch]:
        """Sequences are fetched for a stretch of steps together: those that share one window of
        chunks."""
        stretch = steps_in_a_stretch(self._order)
        for first in range(self._steps.start, self._steps.stop, stretch):
            # fetch
            steps = range(first, min(first + stretch, self._steps.stop))
            wanted = [self._sequences_of_rank(step) for step in steps]
            chunks = self._fetcher.fetch(
                _unpadded(np.concatenate([each.ravel() for each in wanted]))
            )
            # decode, step by step
            for step, numbers_AB in zip(steps, wanted, strict=True):
                try:
                    micro_batches = tuple(self._decode(each_B, chunks) for each_B in numbers_AB)
                except ChunkError:  # as it was published, but published wrong
                    chunks |= self._fetcher.fetch(_unpadded(numbers_AB), try_decoding=True)
                    micro_batches = tuple(self._decode(each_B, chunks) for each_B in numbers_AB)
                yield Batch(step, micro_batches, tuple(self._order.sequences(step).tolist()))

    def _sequences_of_rank(self, step: int) -> np.ndarray:
        """[A, B] sequence numbers of this rank's micro-batches, padded; A is the same for every
        step and rank."""
        sequences = self._order.sequences(step)
        whole = np.full(self._order.global_batch_sequences, _PADDING, dtype=np.int64)
        whole[: len(sequences)] = sequences
        return rank_rows(
            whole, rank=self._rank, world_size=self._world_size, micro_batch=self._micro_batch
        )

    def _decode(self, numbers_B: np.ndarray, chunks: dict[int, Chunk]) -> MicroBatch:
        """A micro-batch of sequences, each in a chunk of its own; padding is a blank without
        targets."""
        length, spec = self._recipe.sequence_length, self._recipe.spec
        parts = [chunks[number] for number in numbers_B.tolist() if number != _PADDING]
        blank_shape, dtypes = (len(numbers_B) - len(parts), length), (np.int32, np.int32, np.uint8)
        blanks = Sequences(*(np.zeros(blank_shape, dtype) for dtype in dtypes))
        sequences = joined(
            [*(part.sequences for part in parts), blanks.without(range(len(blanks)))]
        )
        no_records = np.empty((0, spec.bytes_per_token), dtype=np.uint8)
        records_TB = np.concatenate([no_records, *(part.targets_NB for part in parts)])
        target = decode(torch.from_numpy(records_TB), spec)
        batch = MicroBatch(TokenBatch.of(sequences), target)
        return batch.map(Tensor.pin_memory) if self._pin_memory else batch


def _unpadded(numbers: np.ndarray) -> np.ndarray:
    """The sequence numbers in an array of any shape, ascending."""
    return np.unique(numbers[numbers != _PADDING])


def steps_in_a_stretch(order: Order) -> int:
    """How many steps' sequences a reader fetches together."""
    return max(1, order.window_chunks * order.chunk_sequences // order.global_batch_sequences)


def chunks_read_ahead(order: Order) -> int:
    """How many chunks beyond the cursor, in reading order, a reader may need before it can yield
    its next batch.

    A stretch begins within a group of neighbouring chunks, and among those that it runs through may
    be the group of the short chunk.
    """
    window_sequences = order.window_chunks * order.chunk_sequences
    return (-(-order.global_batch_sequences // window_sequences) + 2) * order.window_chunks
