"""Documents: from the hub, local tables, text files or the standard library, in a shuffled order.

The same section over the same data gives the same order on every machine. A document is a text, for
chat a Conversation, and for tokens a row of ids.
"""

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.bad_rows import BadRowError, require_text, where
from stillhouse.sequences.conversations import Form, form_of
from stillhouse.sequences.ids import form_of_ids
from stillhouse.sequences.shuffle import shuffled_order
from stillhouse.sequences.tables import (
    TEXT_SUFFIXES,
    Table,
    is_empty,
    local_files,
    looks_like_path,
    table_from_hub,
    table_of_files,
)
from stillhouse.store.rollout_store import RolloutsPlace
from stillhouse.tracking.samples import SampleAccount

NOT_STDLIB = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents that are read one at a time."""

    identity: str  # another one whenever a document may have changed
    order: NDArray[np.int64]  # the row, in the data set, of document i
    read: Callable[[int], Any]  # the document in a row; raises BadRowError
    place: Callable[[int], tuple[str, int]]  # a row's file or data set, and its number there
    form: str = ""  # what is read of a row, in words
    # what was seen of samples, once all rows are read; None: they are no samples of a model
    samples: Callable[[], SampleAccount] | None = None
    in_store: RolloutsPlace | None = None  # where their tokens are; None: each is made here

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(row, document) in order. One at a time, for the length of a document is not known before
        it is read. Raises BadRowError with the row's place."""
        for row in map(int, self.order):
            try:
                document = self.read(row)
            except BadRowError as error:
                raise BadRowError(f"{where(*self.place(row))}: {error}") from error
            yield row, document


def load_documents(section: CorpusSection, *, cache_dir: str | Path) -> Documents:
    """The documents that a section names, shuffled by its seed. `cache_dir` holds copies of local
    tables.

    Raises CorpusError: absent, unreadable, streamed or empty data, a missing column, or a setting
    that has no meaning for the source. Raises CacheError where `cache_dir` cannot be written.
    """
    if section.dataset == "stdlib":
        refuse_settings(section, "the standard library", ("subset", "revision"))
        return _from_files(_stdlib_files(), section)
    if not looks_like_path(section.dataset):
        return from_table(table_from_hub(section), section)
    refuse_settings(section, "local files", ("subset", "revision"))
    files = local_files(section.dataset)
    if files[0].suffix in TEXT_SUFFIXES:
        return _from_files(files, section)
    return from_table(table_of_files(files, section, cache_dir=Path(cache_dir)), section)


def from_table(table: Table, section: CorpusSection) -> Documents:
    """The documents in a table. Raises CorpusError for one that is empty or lacks the column."""
    form = _form(table, section)
    read = table.reader(form.columns)
    return _shuffled(
        table.num_rows,
        section,
        identity=f"{table.identity}:{','.join(form.columns)}",
        read=lambda row: form.document(read(row)),
        place=table.place,
        form=form.words,
    )


def _form(table: Table, section: CorpusSection) -> Form:
    """Where in a row its document is. Raises CorpusError where there is no such column."""
    column = section.text_column
    form: Form | None = None
    if section.format == "chat":
        form = form_of(table.columns, section.column)
    elif column in table.columns and section.format == "text":
        form = Form(f"texts of column '{column}'", (column,), partial(_text, column))
    elif column in table.columns:
        form = form_of_ids(table.columns, column, section.mask_column)
    if form is None:
        raise CorpusError(
            f"the data set {section.dataset} has no column '{column}'; it has "
            f"{', '.join(sorted(table.columns))}: set corpus.column"
        )
    return form


def _text(column: str, row: Mapping[str, Any]) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise BadRowError(
            f"it has {type(text).__name__} in column '{column}'; wanted: text. Convert such rows, "
            "or remove them"
        )
    return require_text(text)


def _shuffled(
    num_documents: int,
    section: CorpusSection,
    *,
    identity: str,
    read: Callable[[int], Any],
    place: Callable[[int], tuple[str, int]],
    form: str,
) -> Documents:
    if num_documents == 0:
        raise is_empty(section)
    order = shuffled_order(num_documents, "corpus", seed=section.seed)
    return Documents(identity, order[: section.max_documents], read, place, form)


def _from_files(files: Sequence[Path], section: CorpusSection) -> Documents:
    """A document of each text file. Raises CorpusError at settings that only tables have."""
    # Refuse them.
    if section.format != "text":
        raise CorpusError(
            f"{section.dataset} holds plain text files, which have no conversations and no ids of "
            'tokens; set corpus.format = "text", or name a json, jsonl, csv, parquet or arrow file '
            "with a column of them"
        )
    if section.split != "train":
        raise CorpusError(
            f"{section.dataset} holds plain text files, which have no split '{section.split}'; "
            "leave corpus.split at 'train'"
        )
    if section.text_column != "text":
        raise CorpusError(
            f"{section.dataset} holds plain text files, whose one column is 'text'; found "
            f"corpus.column = '{section.column}'"
        )

    # Known by name, size and time.
    stats = [(str(file), file.stat()) for file in files]
    listing = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return _shuffled(
        len(files),
        section,
        identity="files:" + hashlib.sha256(listing.encode()).hexdigest(),
        read=lambda number: _read_text(files[number]),
        place=lambda number: (str(files[number]), 0),
        form="text files",
    )


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it or "
            "leave it out"
        ) from None
    except OSError as error:
        raise CorpusError(f"cannot read {file}: {error.strerror}") from None


def _stdlib_files() -> list[Path]:
    """The sources of Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        file
        for file in sorted(root.rglob("*.py"))
        if NOT_STDLIB.isdisjoint(file.relative_to(root).parts) and _is_utf8(file)
    ]


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def refuse_settings(section: CorpusSection, source: str, names: Sequence[str]) -> None:
    """Raise CorpusError where one of these settings is given: it has no meaning for the source."""
    given = [f"corpus.{name}" for name in names if getattr(section, name) is not None]
    if given:
        raise CorpusError(
            f"{' and '.join(given)} mean nothing for {source} ({section.dataset}); leave them out"
        )
