"""Single sequences out of the chunks of a store, by byte range, waited for until they are there.

A chunk that is missing is polled for: a teacher may still be making it. A damaged chunk is
reported, and polled for until it has been replaced. A store that is unavailable is waited for, up
to the end of the patience.
"""

import threading
from collections.abc import Callable
from time import monotonic

import numpy as np
import torch

from stillhouse.errors import ChunkError, StudentError
from stillhouse.logits import decode
from stillhouse.retry import Outage, pauses
from stillhouse.store import Chunk, ChunkMissing, ChunkStore, StoreUnavailable

MISSED_S = 30.0
"""A chunk that is missing or damaged for so long is reported (again): it may have been deleted, or
the report lost with the coordinator's process."""

_FIRST_POLL_S, _LAST_POLL_S = 0.05, 1.0


class ClosedError(Exception):
    """The reader was closed while its thread was waiting."""


class SequenceFetcher:
    """Fetches sequences of a store for one thread, until `closed` is set.

    `on_bad_chunk(number)` is called for a missing or damaged chunk, and may raise.
    `on_read(number)` is called before each read from a directory, and `on_read(None)` after it: the
    system may never return from one, whereas a request to an object store has its limits.
    """

    def __init__(
        self,
        store: ChunkStore,
        *,
        outage: Outage,
        on_bad_chunk: Callable[[int], None],
        on_read: Callable[[int | None], None],
        missed_s: float,
        closed: threading.Event,
    ) -> None:
        self._store, self._outage = store, outage
        self._on_bad_chunk = on_bad_chunk
        self._on_read = on_read if store.blobs.directory is not None else lambda _chunk: None
        self._missed_s, self._closed = missed_s, closed

    def fetch(self, sequences: np.ndarray, *, try_decoding: bool = False) -> dict[int, Chunk]:
        """Each sequence number's chunk of that one sequence. `try_decoding`: whether a chunk whose
        records cannot be decoded is damaged, too.

        Raises ClosedError, what `on_bad_chunk` raises, and StoreUnavailable at the end of the
        patience.
        """
        chunk_sequences = self._store.recipe.chunk_sequences
        numbers, rows = np.divmod(sequences, chunk_sequences)
        found: dict[int, Chunk] = {}
        for number in np.unique(numbers).tolist():
            wanted = rows[numbers == number]
            chunk = self._fetch_when_there(number, wanted, try_decoding=try_decoding)
            for index, row in enumerate(wanted.tolist()):
                found[number * chunk_sequences + row] = chunk.row(index)
        return found

    def _fetch_when_there(self, number: int, rows: np.ndarray, *, try_decoding: bool) -> Chunk:
        pauses_s = pauses(_FIRST_POLL_S, last_s=_LAST_POLL_S)
        reported_at, missing_since = -np.inf, monotonic()
        while not self._closed.wait(0):
            try:
                chunk = self._read(number, rows)
                if try_decoding:
                    decode(torch.from_numpy(chunk.targets_NB), self._store.recipe.spec)
                self._outage.is_over()
                return chunk
            except StoreUnavailable as error:
                self._outage.goes_on(error)
            # missing: reported once it has been so for long; what comes next is another chunk
            except ChunkMissing:
                self._outage.is_over()
                reported_at = -np.inf
                if monotonic() - missing_since > self._missed_s:
                    self._on_bad_chunk(number)
                    missing_since = monotonic()
            # damaged: reported at once
            except ChunkError:
                self._outage.is_over()
                if monotonic() - reported_at > self._missed_s:
                    self._on_bad_chunk(number)
                    reported_at = monotonic()
            self._closed.wait(next(pauses_s))
        raise ClosedError

    def _read(self, number: int, rows: np.ndarray) -> Chunk:
        self._on_read(number)
        try:
            return self._store.fetch_rows(number, rows)
        finally:
            self._on_read(None)


def refuse_bad_chunk(number: int) -> None:
    """The `on_bad_chunk` of readers without a teacher pool: raises StudentError, since the chunk
    will not be replaced."""
    raise StudentError(
        f"chunk {number} in the store is damaged or gone, and no teacher is running that could "
        "replace it; `stillhouse store verify URL --repair RUN_DIR` has a teacher make damaged "
        "chunks again, `stillhouse produce` those that are gone"
    )
