"""Packing: documents become sequences of one fixed length, written once to a corpus on disk.

Packing leaves the parts of a document side by side. The sequences to train on are therefore
shuffled once more: any stretch of them, and any chunk, is a random sample of the corpus.

Shapes: S sequences, L tokens in a sequence. loss_mask[s, t] = 1 iff token t+1 exists, belongs to
the same document and is a label.
"""

import hashlib
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from stillhouse import atomic
from stillhouse.cache import writing_cache
from stillhouse.config import CorpusSection
from stillhouse.config.corpus import ROLLOUTS
from stillhouse.errors import CorpusError
from stillhouse.sealed import opened, sealed
from stillhouse.sequence import Sequences
from stillhouse.sequences.account import Account
from stillhouse.sequences.bad_rows import BadRow
from stillhouse.sequences.chat import template_text
from stillhouse.sequences.corpus import (
    BLOCK_TOKENS,
    CACHE_VERSION,
    Corpus,
    rows_per_batch,
    write_corpus,
)
from stillhouse.sequences.documents import Documents, load_documents
from stillhouse.sequences.ids import Tokens
from stillhouse.sequences.pieces import InStore, PieceList
from stillhouse.sequences.rollouts import documents_of_rollouts
from stillhouse.sequences.tokens import tokenise
from stillhouse.store.rollout_store import RolloutsPlace
from stillhouse.tracking.samples import SampleAccount

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# settings that do not decide a corpus of one data set, or whose effect the documents' identity has
_NOT_IN_KEY = {"source", "weight", "mixed_with", "accept", "decontaminate"}


@dataclass(frozen=True, slots=True)
class Split:
    """Two corpora that share no document."""

    train: Corpus
    heldout: Corpus
    account: Account


def prepare_corpus(
    section: CorpusSection,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    tokenizer_digest: str,
    cache_dir: str | Path,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Split:
    """Tokenise and pack a corpus of one data set, or find it in `cache_dir` as made before from the
    same documents, section and tokenizer. Raises CorpusError, CacheError.

    The first documents of the shuffle fill the held-out sequences; what is left of the last of them
    is not used. Left out are sequences without a target, and the last, partial one of packed
    documents. `on_progress` is called after each document, with the numbers of documents and tokens
    so far.
    """
    # All that decides the corpus names its directory: of a template its text, of rollouts what is
    # accepted.
    tables = Path(cache_dir) / "tables"
    if section.dataset.startswith(ROLLOUTS):
        documents = documents_of_rollouts(section, tokenizer, cache_dir=tables)
    else:
        documents = load_documents(section, cache_dir=tables)
    key = {
        "version": CACHE_VERSION,
        "block_tokens": BLOCK_TOKENS,
        "section": section.model_dump(mode="json", exclude=_NOT_IN_KEY)
        | {"chat_template": template_text(section)},
        "tokenizer": tokenizer_digest,
        "documents": documents.identity,
    } | ({} if documents.in_store is None else {"pieces": 1})
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    directory = Path(cache_dir).resolve() / "corpus" / digest[:32]

    # Find it there, or build it beside and rename it.
    with writing_cache(Path(cache_dir)):
        found = _read_split(directory)
        if found is not None:
            return found
        atomic.make_directory(directory.parent)
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
    """Write both corpora, and their description, into a directory."""
    # The corpora: held out first, from the same stream of documents.
    account = Account()
    found = tokenise(documents, section, tokenizer, account=account)
    tokens = _Told(found, account, on_progress)
    length = section.sequence_length

    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    padding = next((token for token in given if token is not None), 0)

    def written(path: Path, limit: int) -> Corpus:
        pieces = PieceList()
        if section.packing:
            sequences = _packed(tokens, pieces, length=length, limit=limit)
        else:
            sequences = _padded(tokens, pieces, length=length, limit=limit, padding=padding)
        corpus = write_corpus(path, sequences, length)
        if documents.in_store is None:
            return corpus
        found = pieces.written(path, documents.in_store, padding=padding)
        return replace(corpus, in_store=found)

    heldout = written(directory / "heldout.arrow", section.heldout_sequences)
    tokens.end_group()
    train = written(directory / "train.arrow", sys.maxsize).shuffled(seed=section.seed)
    account.samples = None if documents.samples is None else documents.samples()
    _require_enough(section, account, train=train, heldout=heldout)

    # Their description: large files by size (their sequences have hashes), small ones by hash.
    values = {
        "corpora": {
            name: _with_paths(asdict(corpus), lambda file: Path(file).name)
            for name, corpus in (("heldout", heldout), ("train", train))
        },
        "account": asdict(account),
        "num_bytes": {file.name: file.stat().st_size for file in directory.iterdir()},
        "xxh3": {file.name: _file_hash(file) for file in directory.glob("*.npy")},
    }
    (directory / "corpus.json").write_text(json.dumps(sealed(values, name="check")))


def _require_enough(
    section: CorpusSection, account: Account, *, train: Corpus, heldout: Corpus
) -> None:
    """Raise CorpusError where there is nothing to train on."""
    if account.left_out and not account.num_documents:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in account.left_out.items())
        raise CorpusError(
            f"of {section.dataset} every sample is left out: {reasons}; wanted some to learn from: "
            "accept more of them (corpus.accept, corpus.decontaminate), or have more written"
        )
    if account.num_tokens and not account.num_labels:
        raise CorpusError(
            f"nothing in the corpus {section.dataset} is learnt: of the {account.num_tokens} "
            f"tokens of its {account.num_documents} documents, no mask has a one. Look at what "
            "the chat template has between its {% generation %} marks, or at the column of masks"
        )
    if train.num_sequences == 0:
        raise CorpusError(
            f"the corpus {section.dataset} is too small: its {account.num_documents} documents "
            f"hold {account.num_tokens} tokens, which make {heldout.num_sequences} sequences of "
            f"{section.sequence_length} with a target in them; wanted: "
            f"{section.heldout_sequences} held-out ones and at least 1 to train on. Give more "
            "documents, or lower corpus.sequence_length or corpus.heldout_sequences"
        )


class _Told(Iterator[Tokens]):
    """The same documents; `on_progress` is told of each that is taken."""

    def __init__(
        self,
        documents: Iterator[Tokens],
        account: Account,
        on_progress: Callable[[int, int], None],
    ):
        self._documents = documents
        self._account = account
        self._on_progress = on_progress
        self._last_group: int | None = None

    def __next__(self) -> Tokens:
        document = next(self._documents)
        self._on_progress(self._account.num_documents, self._account.num_tokens)
        self._last_group = document.group
        return document

    def end_group(self) -> None:
        """Skip the rest of the group, if any, that the last document belongs to."""
        group = self._last_group
        if group is not None:
            self._documents = itertools.dropwhile(lambda each: each.group == group, self._documents)


# ---- tokens -> sequences


def _packed(
    documents: Iterator[Tokens], pieces: PieceList, *, length: int, limit: int
) -> Iterator[Sequences]:
    """Documents end to end, cut into at most `limit` sequences that hold a target; what they are
    made of is added to `pieces`.

    It takes no more documents than it needs.
    """
    pending: list[Tokens] = []
    remaining = limit
    while remaining:
        wanted = min(remaining, rows_per_batch(length)) * length
        num_tokens = sum(len(document) for document in pending)
        while num_tokens < wanted and (document := next(documents, None)) is not None:
            pending.append(document)
            num_tokens += len(document)
        if num_tokens < length:
            return
        given = pending
        rows, pending = _cut(given, num_rows=min(remaining, num_tokens // length), length=length)
        kept_S = _with_targets(rows)
        rows = rows.select(kept_S)
        pieces.add(given, kept_S * length, (kept_S + 1) * length)
        remaining -= len(rows)
        yield rows


def _cut(
    documents: Sequence[Tokens], *, num_rows: int, length: int
) -> tuple[Sequences, list[Tokens]]:
    """The first `num_rows` sequences of documents laid end to end, and what is left of the
    documents."""
    # End to end: of each token its id, its document, and whether it is a label.
    shape, size = (num_rows, length), num_rows * length
    ends = np.cumsum([len(document) for document in documents])
    document_of = np.repeat(np.arange(len(documents)), np.diff(ends, prepend=0))
    document_SL = document_of[:size].reshape(shape)
    ids_SL = np.concatenate([document.ids for document in documents])[:size].reshape(shape)
    is_label = np.concatenate([document.is_label for document in documents])
    is_label_SL = is_label[:size].reshape(shape)

    # Masks and positions, which begin anew where the next token is of another document.
    continues = document_SL[:, 1:] == document_SL[:, :-1]
    mask_SL = np.zeros(shape, dtype=np.uint8)
    mask_SL[:, :-1] = continues & is_label_SL[:, 1:]
    starts_SL = np.zeros(shape, dtype=np.int32)
    starts_SL[:, 1:] = np.where(continues, 0, np.arange(1, length, dtype=np.int32))
    positions_SL = np.arange(length, dtype=np.int32) - np.maximum.accumulate(starts_SL, axis=1)

    # What is left.
    used = int(np.searchsorted(ends, size, side="right"))
    left = list(documents[used:])
    if left:
        left[0] = left[0].after(size - (int(ends[used - 1]) if used else 0))
    return Sequences(ids_SL, positions_SL, mask_SL), left


def _padded(
    documents: Iterator[Tokens], pieces: PieceList, *, length: int, limit: int, padding: int
) -> Iterator[Sequences]:
    """A sequence of each document, cut at `length`; at most `limit` that hold a target. `pieces` is
    as in `_packed`.

    Padding comes last, and its positions count on: under causal attention no real token sees it,
    and it is not taken for a second document.
    """
    remaining = limit
    while remaining:
        ids_SL = np.full((min(remaining, rows_per_batch(length)), length), padding, dtype=np.int32)
        mask_SL = np.zeros(ids_SL.shape, dtype=np.uint8)
        some = itertools.islice(documents, len(ids_SL))
        taken = [document.first(length) for document in some]
        if not taken:
            return
        for row, document in enumerate(taken):
            ids_SL[row, : len(document)] = document.ids
            mask_SL[row, : max(0, len(document) - 1)] = document.is_label[1:]
        positions_SL = np.tile(np.arange(length, dtype=np.int32), (len(taken), 1))
        rows = Sequences(ids_SL[: len(taken)], positions_SL, mask_SL[: len(taken)])
        kept_S = _with_targets(rows)
        rows = rows.select(kept_S)
        ends_S = np.cumsum([len(document) for document in taken])
        pieces.add(taken, np.append(0, ends_S)[kept_S], ends_S[kept_S])
        remaining -= len(rows)
        yield rows


def _with_targets(rows: Sequences) -> NDArray[np.int64]:
    """The numbers of those that have a target."""
    return np.flatnonzero(np.any(rows.loss_mask_SL != 0, axis=1))


# ---- what was prepared before


def _file_hash(path: Path) -> str:
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


def _read_split(directory: Path) -> Split | None:
    """The two corpora of a directory that was prepared before; None where there is none, or its
    files are cut short or damaged."""
    try:
        written = opened(json.loads((directory / "corpus.json").read_text()), name="check")
        corpora = {
            name: _corpus(_with_paths(values, lambda file: str(directory / file)))
            for name, values in written["corpora"].items()
        }
        account = Account(**written["account"])
        account.bad_rows = [BadRow(**row) for row in written["account"]["bad_rows"]]
        samples = written["account"].get("samples")
        account.samples = None if samples is None else SampleAccount.from_json(samples)
        is_whole = all(
            (directory / name).stat().st_size == size for name, size in written["num_bytes"].items()
        ) and all(
            _file_hash(directory / name) == digest for name, digest in written["xxh3"].items()
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Split(**corpora, account=account) if is_whole else None


def _corpus(values: dict[str, Any]) -> Corpus:
    """A Corpus of its fields."""
    in_store = values.get("in_store")
    if in_store is not None:
        in_store = InStore(**in_store | {"place": RolloutsPlace(*in_store["place"])})
    return Corpus(**values | {"in_store": in_store})


def _with_paths(corpus: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The fields of a Corpus with each of its paths changed."""
    paths = [name for name in corpus if name.endswith("path") and corpus[name] is not None]
    changed = corpus | {name: change(corpus[name]) for name in paths}
    if corpus.get("in_store") is not None:
        changed["in_store"] = _with_paths(corpus["in_store"], change)
    return changed


def _move_into_place(building: Path, directory: Path) -> None:
    """Rename a finished directory. In its place may be a damaged copy, which is removed, or a whole
    one, which another process finished first with the same bytes and which stays."""
    with atomic.one_at_a_time(directory.parent):  # or one would remove what another has moved
        if _read_split(directory) is None:
            shutil.rmtree(directory, ignore_errors=True)
            atomic.move_directory(building, directory)
