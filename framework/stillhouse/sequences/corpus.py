"""A corpus: sequences on disk, written once as Arrow, memory-mapped, and each checked against its
hash whenever it is read.

Arrow's own structure is for other programs. Here the offsets of all columns are kept in a file of
their own, so that damage to that structure cannot mislead: what is read is what was written, or
CorpusError is raised.

Shapes: S sequences, L tokens in a sequence, B record batches.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from stillhouse.errors import CorpusError
from stillhouse.sequence import Sequences, joined
from stillhouse.sequences.pieces import InStore, Located, LocatedBlock, StoredSequences
from stillhouse.sequences.shuffle import shuffled_order
from stillhouse.store.rollout_store import RolloutsPlace

Number = TypeVar("Number", np.int32, np.uint8)

# A change to tokenising, packing, masks or order raises it, and with it every digest.
CACHE_VERSION = 2
_MAPS = 32  # small files that stay mapped: three of each corpus in use, five of one of rollouts
BLOCK_TOKENS = 1 << 18  # tokens in one Arrow record batch; bounds memory


@dataclass(frozen=True, slots=True)
class Corpus:
    """A file of sequences as a plain value: it holds nothing open, and can be pickled."""

    path: str
    hashes_path: str  # xxh3 of each sequence: uint64 [S], in the order of the file
    offsets_path: str  # bytes before each record batch's ids, positions and masks: int64 [B, 3]
    order_path: str | None  # each sequence's index in the file: int64 [S]; None: 0 to S - 1
    digest: str  # sha256 over ids, positions, masks, shape and order
    num_sequences: int
    sequence_length: int
    num_targets: int  # ones of the loss mask
    in_store: InStore | None = None  # where else the tokens are; None: nowhere

    def rows(self, start: int, stop: int) -> Sequences:
        """Sequences start <= s < stop; views of the memory map where they are adjacent in the file.

        Raises IndexError out of range, CorpusError where the file is damaged.
        """
        # Read them, a run of neighbours in the file at a time.
        indices_S = self._indices(np.arange(start, stop))
        data = np.asarray(np.memmap(self.path, np.uint8, mode="r"))
        hashes_S = mapped(self.hashes_path)
        runs = np.split(indices_S, np.flatnonzero(np.diff(indices_S) != 1) + 1)
        rows = joined(
            [self._run(data, run[0], run[-1] + 1, num_written=len(hashes_S)) for run in runs]
        )

        # Check each against its hash.
        changed = np.flatnonzero(hashes_of(rows) != hashes_S[indices_S])
        if len(changed):
            raise CorpusError(
                f"sequence {start + int(changed[0])} of {self.path} is not what was written "
                f"there: the file is damaged; remove {Path(self.path).parent}, and the same "
                "command makes it again from the documents"
            )
        return rows

    def located(self, start: int, stop: int) -> LocatedBlock:
        """The same sequences, by where they are in a store, if they are in one."""
        numbers_S = np.arange(start, stop)
        return LocatedBlock([self.located_at(numbers_S)], numbers_S - start)

    def located_at(self, numbers_S: NDArray[np.int64]) -> Located:
        """As `located`, of any sequences by their numbers. Raises IndexError, CorpusError."""
        if self.in_store is None:
            return joined([self.rows(number, number + 1) for number in numbers_S.tolist()])
        indices_S = self._indices(numbers_S)
        all_ends, pieces_P4 = mapped(self.in_store.ends_path), mapped(self.in_store.pieces_path)
        ends_S = all_ends[indices_S]
        begins_S = np.where(indices_S == 0, 0, all_ends[indices_S - 1])
        found = [pieces_P4[first:last] for first, last in zip(begins_S, ends_S, strict=True)]
        return StoredSequences(
            self.in_store.place,
            self.sequence_length,
            self.in_store.padding,
            pieces_P4=np.concatenate(found),
            ends_S=np.cumsum(ends_S - begins_S),
            hashes_S=mapped(self.hashes_path)[indices_S],
        )

    @property
    def read_from(self) -> list[RolloutsPlace]:
        """The stores that `located` names."""
        return [] if self.in_store is None else [self.in_store.place]

    def _indices(self, numbers_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [S]: where in the file sequences are. Raises IndexError."""
        least, most = int(numbers_S.min(initial=0)), int(numbers_S.max(initial=-1))
        if least < 0 or most >= self.num_sequences or not len(numbers_S):
            raise IndexError(f"sequences {least} to {most} of a corpus of {self.num_sequences}")
        if self.order_path is None:
            return numbers_S
        order_S: NDArray[np.int64] = mapped(self.order_path)
        return order_S[numbers_S]

    def _run(
        self, data: NDArray[np.uint8], start: int, stop: int, *, num_written: int
    ) -> Sequences:
        """Sequences start <= s < stop of the file's `num_written`, unchecked."""
        size = rows_per_batch(self.sequence_length)
        offsets_B3 = mapped(self.offsets_path)
        parts = []
        for number in range(start // size, (stop - 1) // size + 1):
            ids, positions, mask = offsets_B3[number].tolist()
            shape = min(size, num_written - number * size), self.sequence_length
            parts.append(
                Sequences(
                    _array(data, ids, np.int32, shape),
                    _array(data, positions, np.int32, shape),
                    _array(data, mask, np.uint8, shape),
                )
            )
        first = start // size * size
        return joined(parts).select(slice(start - first, stop - first))

    def shuffled(self, *, seed: int) -> "Corpus":
        """The same sequences in an order that the seed decides; the order is written to a file."""
        order_S = shuffled_order(self.num_sequences, "sequence", seed=seed)
        order_path = Path(self.path).with_suffix(".order.npy")
        np.save(order_path, order_S)
        parts = [self.digest, hashlib.sha256(order_S.data).hexdigest()]
        return replace(
            self,
            order_path=str(order_path),
            digest=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        )


def write_corpus(path: Path, blocks: Iterable[Sequences], length: int) -> Corpus:
    """Write sequences of `length` tokens to `path`, and their hashes and offsets to files beside
    it."""
    # The sequences, digested while they are written.
    schema = pa.schema(
        [
            ("token_ids", pa.list_(pa.int32(), length)),
            ("positions", pa.list_(pa.int32(), length)),
            ("loss_mask", pa.list_(pa.uint8(), length)),
        ]
    )
    digests = [hashlib.sha256() for _ in schema]
    hashes = [np.empty(0, np.uint64)]
    num_targets = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for rows in _in_batches(blocks, rows_per_batch(length)):
            columns: list[NDArray[np.generic]] = [array.ravel() for array in rows.arrays]
            for digest, column in zip(digests, columns, strict=True):
                digest.update(column.data)
            arrays = [
                pa.FixedSizeListArray.from_arrays(pa.array(column), length) for column in columns
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            hashes.append(hashes_of(rows))
            num_targets += rows.num_targets

    # The files beside it, and the digest of all.
    hashes_S = np.concatenate(hashes)
    hashes_path, offsets_path = path.with_suffix(".xxh3.npy"), path.with_suffix(".offsets.npy")
    np.save(hashes_path, hashes_S)
    np.save(offsets_path, _offsets_in(path))
    parts = [
        f"stillhouse corpus {CACHE_VERSION}",
        len(hashes_S),
        length,
        *(digest.hexdigest() for digest in digests),
    ]
    return Corpus(
        path=str(path),
        hashes_path=str(hashes_path),
        offsets_path=str(offsets_path),
        order_path=None,
        digest=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        num_sequences=len(hashes_S),
        sequence_length=length,
        num_targets=num_targets,
    )


def mapped(path: str) -> NDArray[Any]:
    """The array of an .npy file, as a read-only memory map. The file is opened once in a process,
    as long as it is the same file."""
    found = os.stat(path)
    return _mapped(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=_MAPS)  # the identity is part of the key: a file may be written again
def _mapped(path: str, _identity: tuple[int, ...]) -> NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r"))


def hashes_of(rows: Sequences) -> NDArray[np.uint64]:
    """uint64 [S]: xxh3 over the bytes of each sequence's ids, positions and mask."""
    columns = [np.ascontiguousarray(column) for column in rows.arrays]
    return np.array(
        [
            xxhash.xxh3_64_intdigest(b"".join(column[row] for column in columns))
            for row in range(len(rows))
        ],
        np.uint64,
    )


def rows_per_batch(length: int) -> int:
    """Sequences in a record batch; the last one of a file may hold fewer."""
    return max(1, BLOCK_TOKENS // length)


def _array(
    data: NDArray[np.uint8], offset: int, dtype: type[Number], shape: tuple[int, int]
) -> NDArray[Number]:
    """A view of the values that begin at this byte."""
    num_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
    return data[offset : offset + num_bytes].view(dtype).reshape(shape)


def _offsets_in(path: Path) -> NDArray[np.int64]:
    """int64 [B, 3]: where the values of each record batch's columns begin."""
    whole = pa.memory_map(str(path)).read_buffer()
    file = pa.ipc.open_file(whole)
    batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    found = [
        [column.values.buffers()[1].address - whole.address for column in batch.columns]
        for batch in batches
    ]
    return np.array(found, np.int64).reshape(-1, 3)


def _in_batches(blocks: Iterable[Sequences], size: int) -> Iterator[Sequences]:
    """The same sequences, `size` at a time, so that a sequence's record batch is found by a
    division. The last batch may hold fewer."""
    held: list[Sequences] = []
    for block in blocks:
        held.append(block)
        while sum(map(len, held)) >= size:
            together = joined(held)
            yield together.select(slice(size))
            held = [together.select(slice(size, None))]
    if any(map(len, held)):
        yield joined(held)
