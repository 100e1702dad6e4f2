"""Documents become sequences of one fixed length, written once to memory-mapped Arrow; a corpus is the digest of its ids, positions, masks.

Every sequence is checked against its own hash each time that it is read, and the small files beside the sequences when they are opened:
what a disk has changed is refused, or made again, and never taught or learned.

Packing leaves the parts of a document side by side. So the sequences to train on are shuffled once more: any stretch of them, and so any
chunk, is a random sample of the corpus.

Shapes: S sequences, L tokens in a sequence. loss_mask[s, t] = 1 iff token t+1 exists, belongs to the same document and is a label.
"""

import hashlib
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from stillhouse.config import CorpusSection
from stillhouse.corpus.documents import Documents, load_documents, shuffled_order
from stillhouse.corpus.tokens import Tokens, tokenise
from stillhouse.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CACHE_VERSION = 2  # of this file's semantics: a change to tokenising, packing, masks or layout raises it
BLOCK_TOKENS = 1 << 18  # tokens in one Arrow record batch; bounds memory


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive sequences; the arrays may be read-only views of a memory map."""

    token_ids_SL: NDArray[np.int32]
    positions_SL: NDArray[np.int32]  # restart at 0 at each document and at each sequence
    loss_mask_SL: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.token_ids_SL)

    def select(self, rows: slice | NDArray[np.bool_]) -> "Rows":
        return Rows(self.token_ids_SL[rows], self.positions_SL[rows], self.loss_mask_SL[rows])


@dataclass(frozen=True, slots=True)
class Corpus:
    """A file of sequences as a plain value: it holds nothing open, and pickles."""

    path: str
    hashes_path: str  # of the sequences, xxh3 as uint64 [S], in the order of the file
    order_path: str | None  # of the places in the file, int64 [S] in the corpus's order; None: as they lie
    digest: str  # sha256 over ids, positions, masks, shape and order
    num_sequences: int
    sequence_length: int
    num_targets: int  # ones of the loss mask

    def rows(self, start: int, stop: int) -> Rows:
        """Sequences start <= s < stop: views of the memory map where they lie together in it.

        Raises IndexError out of range, CorpusError where the file is damaged.
        """
        if not 0 <= start < stop <= self.num_sequences:
            raise IndexError(f"sequences {start} to {stop} of a corpus of {self.num_sequences}")
        try:
            file = pa.ipc.open_file(pa.memory_map(self.path))
            if self.order_path is None:
                places_S = np.arange(start, stop)
                rows = self._together(file, start, stop)
            else:
                places_S = np.load(self.order_path, mmap_mode="r")[start:stop]
                rows = _joined([self._together(file, place, place + 1) for place in places_S.tolist()])
        except (pa.ArrowException, ValueError, OSError, IndexError) as error:
            raise self._damaged(f"cannot be read ({error})") from None
        changed = np.flatnonzero(_hashes_of(rows) != np.load(self.hashes_path, mmap_mode="r")[places_S])
        if len(changed):
            raise self._damaged(f"is damaged: sequence {start + int(changed[0])} is not what was written")
        return rows

    def _damaged(self, how: str) -> CorpusError:
        path = Path(self.path)
        return CorpusError(f"{path} {how}; remove the directory {path.parent}, and the same command makes it again from the documents")

    def _together(self, file: pa.ipc.RecordBatchFileReader, start: int, stop: int) -> Rows:
        """The sequences at these places of the file."""
        size = _rows_per_batch(self.sequence_length)
        parts = [_rows_of(file.get_batch(number), self.sequence_length) for number in range(start // size, (stop - 1) // size + 1)]
        first = start // size * size
        return _joined(parts).select(slice(start - first, stop - first))


@dataclass(frozen=True, slots=True)
class Split:
    """Two corpora that share no document."""

    train: Corpus
    heldout: Corpus


@dataclass(slots=True)
class _Tally:
    """What went by."""

    documents: int = 0
    tokens: int = 0


def prepare_corpus(
    section: CorpusSection,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    tokenizer_digest: str,
    cache_dir: str | Path,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Split:
    """Tokenise and pack a corpus, or find it in `cache_dir` as made before from the same documents, section and tokenizer.

    `on_progress` is told, after each document, how many documents and tokens there were so far.

    The first documents of the shuffle fill the held-out sequences; what is left of the last of them is not used. Sequences without a
    single target are left out, and so is the last, partial one of packed documents. Raises CorpusError.
    """
    documents = load_documents(section, cache_dir=Path(cache_dir) / "tables")
    key = {
        "version": CACHE_VERSION,
        "block_tokens": BLOCK_TOKENS,
        "section": section.model_dump(mode="json"),
        "tokenizer": tokenizer_digest,
        "documents": documents.identity,
    }
    directory = Path(cache_dir).resolve() / "corpus" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    found = _read_split(directory)
    if found is not None:
        return found
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix="building-", dir=directory.parent))
    try:
        _build(building, documents, section, tokenizer, on_progress)
        _move_into_place(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    split = _read_split(directory)
    assert split is not None
    return split


def _build(
    directory: Path,
    documents: Documents,
    section: CorpusSection,
    tokenizer: "PreTrainedTokenizerFast",
    on_progress: Callable[[int, int], None],
) -> None:
    tally = _Tally()
    tokens = _counted(tokenise(documents, section, tokenizer), tally, on_progress)
    length = section.sequence_length

    def sequences(limit: int) -> Iterator[Rows]:
        if section.packing:
            return _packed(tokens, length=length, limit=limit)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return _padded(tokens, length=length, limit=limit, padding=padding or 0)

    corpora = {
        "heldout": _write(directory / "heldout.arrow", sequences(section.heldout_sequences), length),
        "train": _shuffled(_write(directory / "train.arrow", sequences(sys.maxsize), length), seed=section.seed),
    }
    found = corpora["heldout"].num_sequences + corpora["train"].num_sequences
    if corpora["train"].num_sequences == 0:
        raise CorpusError(
            f"the corpus {section.dataset} is too small: its {tally.documents} documents hold {tally.tokens} tokens, which make {found}"
            f" sequences of {length} with a target in them; wanted: {section.heldout_sequences} held-out ones and at least 1 to train on."
            " Give more documents, or lower corpus.sequence_length or corpus.heldout_sequences"
        )
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    small = {file.name: _file_hash(file) for file in directory.glob("*.npy")}
    written = {name: _with_paths(asdict(corpus), lambda file: Path(file).name) for name, corpus in corpora.items()}
    values = {"corpora": written, "num_bytes": sizes, "xxh3": small}
    (directory / "corpus.json").write_text(json.dumps(values | {"check": _check_of(values)}))


def _counted(documents: Iterable[Tokens], tally: _Tally, on_progress: Callable[[int, int], None]) -> Iterator[Tokens]:
    for document in documents:
        tally.documents += 1
        tally.tokens += len(document)
        on_progress(tally.documents, tally.tokens)
        yield document


# ---- tokens -> sequences


def _packed(documents: Iterator[Tokens], *, length: int, limit: int) -> Iterator[Rows]:
    """Documents end to end, cut into at most `limit` sequences that hold a target; it takes no document more than it needs."""
    pending: list[Tokens] = []
    remaining = limit
    while remaining:
        wanted = min(remaining, _rows_per_batch(length)) * length
        num_tokens = sum(len(document) for document in pending)
        while num_tokens < wanted and (document := next(documents, None)) is not None:
            pending.append(document)
            num_tokens += len(document)
        if num_tokens < length:
            return
        rows, pending = _cut(pending, num_rows=min(remaining, num_tokens // length), length=length)
        rows = _with_targets(rows)
        remaining -= len(rows)
        yield rows


def _cut(documents: Sequence[Tokens], *, num_rows: int, length: int) -> tuple[Rows, list[Tokens]]:
    """The first `num_rows` sequences of documents laid end to end, and what is left of the documents."""
    size = num_rows * length
    ends = np.cumsum([len(document) for document in documents])
    document_SL = np.repeat(np.arange(len(documents)), np.diff(ends, prepend=0))[:size].reshape(num_rows, length)
    ids_SL = np.concatenate([document.ids for document in documents])[:size].reshape(num_rows, length)
    is_label_SL = np.concatenate([document.is_label for document in documents])[:size].reshape(num_rows, length)

    continues = document_SL[:, 1:] == document_SL[:, :-1]
    mask_SL = np.zeros((num_rows, length), dtype=np.uint8)
    mask_SL[:, :-1] = continues & is_label_SL[:, 1:]
    starts_SL = np.zeros((num_rows, length), dtype=np.int32)
    starts_SL[:, 1:] = np.where(continues, 0, np.arange(1, length, dtype=np.int32))
    positions_SL = np.arange(length, dtype=np.int32) - np.maximum.accumulate(starts_SL, axis=1)

    used = int(np.searchsorted(ends, size, side="right"))
    left = list(documents[used:])
    if left:
        done = size - (int(ends[used - 1]) if used else 0)
        left[0] = Tokens(left[0].ids[done:], left[0].is_label[done:])
    return Rows(ids_SL, positions_SL, mask_SL), left


def _padded(documents: Iterator[Tokens], *, length: int, limit: int, padding: int) -> Iterator[Rows]:
    """Each document its own sequence, cut at `length`; at most `limit` that hold a target.

    Padding comes last and its positions go on: under causal attention no real token sees it, and no model takes it for a second document.
    """
    remaining = limit
    while block := list(itertools.islice(documents, min(remaining, _rows_per_batch(length)))):
        ids_SL = np.full((len(block), length), padding, dtype=np.int32)
        mask_SL = np.zeros((len(block), length), dtype=np.uint8)
        for row, document in enumerate(block):
            size = min(length, len(document))
            ids_SL[row, :size] = document.ids[:size]
            mask_SL[row, : size - 1] = document.is_label[1:size]
        positions_SL = np.tile(np.arange(length, dtype=np.int32), (len(block), 1))
        rows = _with_targets(Rows(ids_SL, positions_SL, mask_SL))
        remaining -= len(rows)
        yield rows


def _with_targets(rows: Rows) -> Rows:
    return rows.select(np.any(rows.loss_mask_SL != 0, axis=1))


# ---- sequences <-> files


def _write(path: Path, blocks: Iterable[Rows], length: int) -> Corpus:
    schema = pa.schema(
        [
            ("token_ids", pa.list_(pa.int32(), length)),
            ("positions", pa.list_(pa.int32(), length)),
            ("loss_mask", pa.list_(pa.uint8(), length)),
        ]
    )
    hashes = [hashlib.sha256() for _ in schema]
    row_hashes = []
    num_sequences = num_targets = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for rows in _in_batches(blocks, _rows_per_batch(length)):
            columns: list[NDArray[np.generic]] = [rows.token_ids_SL.ravel(), rows.positions_SL.ravel(), rows.loss_mask_SL.ravel()]
            for digest, column in zip(hashes, columns, strict=True):
                digest.update(column.data)
            arrays = [pa.FixedSizeListArray.from_arrays(pa.array(column), length) for column in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            row_hashes.append(_hashes_of(rows))
            num_sequences += len(rows)
            num_targets += int(rows.loss_mask_SL.sum(dtype=np.int64))
    hashes_path = path.with_suffix(".xxh3.npy")
    np.save(hashes_path, np.concatenate([np.empty(0, np.uint64), *row_hashes]))
    parts = [f"stillhouse corpus {CACHE_VERSION}", num_sequences, length, *(digest.hexdigest() for digest in hashes)]
    of_all = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Corpus(str(path), str(hashes_path), None, of_all, num_sequences, length, num_targets)


def _shuffled(corpus: Corpus, *, seed: int) -> Corpus:
    """The same sequences in an order by seed, which is written beside them."""
    order_S = shuffled_order(corpus.num_sequences, "sequence", seed=seed)
    order_path = Path(corpus.path).with_suffix(".order.npy")
    np.save(order_path, order_S)
    parts = [corpus.digest, hashlib.sha256(order_S.data).hexdigest()]
    return replace(corpus, order_path=str(order_path), digest=hashlib.sha256(json.dumps(parts).encode()).hexdigest())


def _in_batches(blocks: Iterable[Rows], size: int) -> Iterator[Rows]:
    """The same sequences, `size` at a time, the last ones fewer: a sequence's record batch is then a matter of division."""
    held: list[Rows] = []
    for block in blocks:
        held.append(block)
        while sum(map(len, held)) >= size:
            joined = _joined(held)
            yield joined.select(slice(size))
            held = [joined.select(slice(size, None))]
    rest = _joined(held) if held else None
    if rest is not None and len(rest):
        yield rest


def _rows_per_batch(length: int) -> int:
    return max(1, BLOCK_TOKENS // length)


def _joined(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return Rows(
        np.concatenate([part.token_ids_SL for part in parts]),
        np.concatenate([part.positions_SL for part in parts]),
        np.concatenate([part.loss_mask_SL for part in parts]),
    )


def _rows_of(batch: pa.RecordBatch, length: int) -> Rows:
    ids_SL, positions_SL, mask_SL = (column.flatten().to_numpy(zero_copy_only=True).reshape(-1, length) for column in batch.columns)
    return Rows(ids_SL, positions_SL, mask_SL)


def _hashes_of(rows: Rows) -> NDArray[np.uint64]:
    """uint64 [S]: xxh3 over the bytes of each sequence's ids, positions and mask."""
    columns = [np.ascontiguousarray(column) for column in (rows.token_ids_SL, rows.positions_SL, rows.loss_mask_SL)]
    return np.array([xxhash.xxh3_64_intdigest(b"".join(column[row] for column in columns)) for row in range(len(rows))], np.uint64)


def _file_hash(path: Path) -> str:
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


def _check_of(values: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def _read_split(directory: Path) -> Split | None:
    """The two corpora of a directory that was prepared before; None where there is none, or its files are cut short or damaged."""
    try:
        written = json.loads((directory / "corpus.json").read_text())
        if written.pop("check") != _check_of(written):
            return None
        corpora = {name: Corpus(**_with_paths(values, lambda file: str(directory / file))) for name, values in written["corpora"].items()}
        is_whole = all((directory / name).stat().st_size == size for name, size in written["num_bytes"].items())
        is_whole = is_whole and all(_file_hash(directory / name) == digest for name, digest in written["xxh3"].items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Split(train=corpora["train"], heldout=corpora["heldout"]) if is_whole else None


def _with_paths(corpus: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    return corpus | {field: change(corpus[field]) for field in ("path", "hashes_path", "order_path") if corpus[field] is not None}


def _move_into_place(building: Path, directory: Path) -> None:
    """Rename, and make way for nothing but a damaged copy: another process may have finished first with the same bytes."""
    if _read_split(directory) is None:
        shutil.rmtree(directory, ignore_errors=True)
    try:
        building.rename(directory)
    except OSError:
        if _read_split(directory) is None:
            raise
