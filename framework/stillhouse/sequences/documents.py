"""Documents: from the hub, local tables, text files or the standard library, in a shuffled order.

The same section over the same data gives the same order on every machine. A document is a text, or
for chat a Conversation. No other module imports `datasets`.
"""

import glob
import hashlib
import json
import logging
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse import atomic
from stillhouse.cache import is_no_room, unwritable, writing_cache
from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.seeded import GOLDEN, splitmix64
from stillhouse.sequences.conversations import Form, form_of
from stillhouse.sequences.json_files import first_fault

TEXT_SUFFIXES = frozenset({".txt", ".text", ".py", ".md"})
TABLE_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SUFFIXES = TEXT_SUFFIXES | TABLE_READERS.keys()
_LOADING_ERRORS = (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException)
_FAULTS_OF_FILES = (
    datasets.exceptions.DatasetGenerationError,
    pa.ArrowException,
    UnicodeDecodeError,
)
NOT_STDLIB = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)

# It logs an error that is raised here, too, with its line.
logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents that are read one at a time."""

    identity: str  # another one whenever a document may have changed
    order: NDArray[np.int64]  # the row, in the data set, of document i
    read: Callable[[int], Any]  # the document in a row

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(row, document) in order. One at a time, for the length of a document is not known before
        it is read."""
        for row in map(int, self.order):
            yield row, self.read(row)


def load_documents(section: CorpusSection, *, cache_dir: str | Path) -> Documents:
    """The documents that a section names, shuffled by its seed. `cache_dir` holds local tables as
    Arrow files.

    Raises CorpusError: absent, unreadable, streamed or empty data, a missing column, or a setting
    that has no meaning for the source. Raises CacheError where `cache_dir` cannot be written.
    """
    if section.dataset == "stdlib":
        _refuse_settings(section, "the standard library", ("subset", "revision"))
        return _from_files(_stdlib_files(), section)
    if not looks_like_path(section.dataset):
        return from_dataset(_load_from_hub(section), section)
    _refuse_settings(section, "local files", ("subset", "revision"))
    files = _local_files(section.dataset)
    if files[0].suffix in TEXT_SUFFIXES:
        return _from_files(files, section)
    return from_dataset(_load_tables(files, section, Path(cache_dir)), section, files=files)


def from_dataset(
    dataset: object, section: CorpusSection, *, files: Sequence[Path] = ()
) -> Documents:
    """The documents in a column of a loaded data set; `files` are the local ones that it was loaded
    from.

    Raises CorpusError: streamed or empty data, or a missing column. Reading raises it, too, at a
    text that is not UTF-8.
    """
    # Refuse what has no fixed order, or no such column.
    if not isinstance(dataset, datasets.Dataset):
        raise CorpusError(
            f"the data set {section.dataset} came as {type(dataset).__name__}, whose length is "
            "not known; a fixed order needs a data set on disk: load it without streaming, with "
            "one split"
        )
    form = _form(dataset.column_names, section)

    # Read its rows one by one.
    rows = dataset.select_columns(list(form.columns))

    def read(row: int) -> Any:
        try:
            values = rows[row]
        except UnicodeDecodeError as error:  # a table's texts are bytes, decoded only here
            fault = first_fault(_json_of(files)) or (
                f"row {row} of {section.dataset}: not UTF-8 text ({error.reason}); convert or "
                "remove it"
            )
            raise CorpusError(f"the corpus cannot be read: {fault}") from None
        return form.conversation({name: _as_in_its_file(each) for name, each in values.items()})

    return _shuffled(
        len(rows), read, f"datasets:{dataset._fingerprint}:{','.join(form.columns)}", section
    )


def _form(columns: Sequence[str], section: CorpusSection) -> Form:
    """Where in a row its document is. Raises CorpusError where there is no such column."""
    column = section.text_column
    form: Form | None = None
    if section.format == "chat":
        form = form_of(columns, section.column)
    elif column in columns:
        form = Form(f"column '{column}'", (column,), lambda row: row[column])
    if form is None:
        raise CorpusError(
            f"the data set {section.dataset} has no column '{column}'; it has "
            f"{', '.join(sorted(columns))}: set corpus.column"
        )
    return form


def _as_in_its_file(column: Any) -> Any:
    """A column's value without the empty fields that a table adds to objects that lack a field of
    others. Those of a message itself are kept: they are told in errors."""
    if isinstance(column, list):
        return [
            {name: _without_empty(each) for name, each in item.items()}
            if isinstance(item, dict)
            else item
            for item in column
        ]
    return column


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_empty(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_empty(each) for each in value]
    return value


def looks_like_path(name: str) -> bool:
    """Whether `name` is meant as a local path: it starts as one, is a glob, ends in a suffix that
    is read, or exists."""
    is_explicit = name.startswith(("/", ".", "~")) or any(mark in name for mark in "*?[")
    return is_explicit or Path(name).suffix in _SUFFIXES or Path(name).exists()


def shuffled_order(
    num_items: int, purpose: Literal["corpus", "sequence"], *, seed: int
) -> NDArray[np.int64]:
    """A permutation of a corpus's documents or sequences: int64 [num_items], a function of these
    arguments alone.

    Items are sorted by splitmix64 of their number and the seed. NumPy's permutations are not used,
    for they may change between its versions.
    """
    digest = hashlib.sha256(f"stillhouse {purpose} order {seed}".encode()).digest()
    start = int.from_bytes(digest[:8], "little", signed=True)
    mixed = splitmix64(np.arange(1, num_items + 1, dtype=np.int64) * GOLDEN + start)
    return np.argsort(mixed.view(np.uint64), kind="stable").astype(np.int64)


def _shuffled(
    num_documents: int, read: Callable[[int], Any], identity: str, section: CorpusSection
) -> Documents:
    if num_documents == 0:
        raise _is_empty(section)
    order = shuffled_order(num_documents, "corpus", seed=section.seed)
    return Documents(identity, order[: section.max_documents], read)


def _from_files(files: Sequence[Path], section: CorpusSection) -> Documents:
    """A document of each text file. Raises CorpusError at settings that only tables have."""
    if section.format == "chat":
        raise CorpusError(
            f"{section.dataset} holds plain text files, which have no conversations; set "
            'corpus.format = "text", or name a json, jsonl, parquet or arrow file with a column of '
            "messages"
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
    stats = [(str(file), file.stat()) for file in files]
    listing = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    identity = "files:" + hashlib.sha256(listing.encode()).hexdigest()
    return _shuffled(len(files), lambda number: _read_text(files[number]), identity, section)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
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


def _local_files(name: str) -> list[Path]:
    """The files that a path, directory or glob names, sorted, all of one kind."""
    # Find them.
    path = Path(name).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and file.suffix in _SUFFIXES]
    elif path.is_file():
        found = [path]
    else:
        matches = map(Path, glob.glob(str(path), recursive=True))
        found = [match for match in matches if match.is_file()]
    suffixes = ", ".join(sorted(_SUFFIXES))
    if not found:
        what = "holds no file that can be read" if path.is_dir() else "does not exist"
        raise CorpusError(
            f"the corpus {name} {what}; give a file, glob or directory of {suffixes}, a hub name "
            "such as 'owner/name', or 'stdlib'"
        )

    # Refuse files of an unknown kind, or of several kinds.
    kinds = {
        "text" if file.suffix in TEXT_SUFFIXES else TABLE_READERS.get(file.suffix, file.suffix)
        for file in found
    }
    unknown = kinds - {"text", *TABLE_READERS.values()}
    if unknown:
        raise CorpusError(
            f"{name} ends in '{sorted(unknown)[0]}', which is not read; wanted: {suffixes}"
        )
    if len(kinds) > 1:
        raise CorpusError(
            f"{name} holds files of several kinds ({', '.join(sorted(kinds))}); name one kind "
            f"with a glob such as '{name}/**/*.txt'"
        )
    return sorted(file.resolve() for file in found)


def _load_tables(files: Sequence[Path], section: CorpusSection, cache_dir: Path) -> object:
    """A data set of local tables, which `datasets` converts to Arrow files in `cache_dir`."""
    reader, names = TABLE_READERS[files[0].suffix], [str(file) for file in files]
    with writing_cache(cache_dir):
        atomic.make_directory(cache_dir)
    try:
        return datasets.load_dataset(
            reader, split=section.split, data_files=names, cache_dir=str(cache_dir)
        )
    except StopIteration:  # raised for JSON files without a byte
        raise _is_empty(section) from None
    except _LOADING_ERRORS as error:
        if (failed_write := _failed_write(error, cache_dir)) is not None:
            raise unwritable(cache_dir, failed_write) from error
        if (
            isinstance(error, _FAULTS_OF_FILES)
            and (fault := first_fault(_json_of(files))) is not None
        ):
            raise CorpusError(f"the corpus cannot be loaded: {fault}") from error
        raise CorpusError(
            f"the data set {section.dataset} cannot be loaded: {_reason_of(error)}"
        ) from error


def _load_from_hub(section: CorpusSection) -> object:
    """A data set from the hub."""
    try:
        return datasets.load_dataset(
            section.dataset, section.subset, split=section.split, revision=section.revision
        )
    except StopIteration:
        raise _is_empty(section) from None
    except _LOADING_ERRORS as error:
        raise CorpusError(
            f"the data set {section.dataset} cannot be loaded: {_reason_of(error)}; "
            f"{cure_of_hub(error)}"
        ) from error


def cure_of_hub(error: BaseException) -> str:
    """What to do where a data set from the hub cannot be loaded."""
    if any(isinstance(cause, OSError) and is_no_room(cause) for cause in _causes(error)):
        return (
            "make room on the disk of the Hugging Face cache, or set HF_HOME to a directory on "
            "another disk"
        )
    return (
        "check name, subset and split, and for a gated or private one run `hf auth login` or "
        "set HF_TOKEN"
    )


def _is_empty(section: CorpusSection) -> CorpusError:
    return CorpusError(
        f"the data set {section.dataset} is empty; name one with documents in split "
        f"'{section.split}'"
    )


def _reason_of(error: BaseException) -> str:
    return f"{error}" if error.__cause__ is None else f"{error}: {error.__cause__}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _failed_write(error: BaseException, cache_dir: Path) -> OSError | None:
    """The error of a write to the cache in the chain of causes; None where there is none. All other
    files are only read."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and (
            is_no_room(cause) or Path(str(cause.filename)).is_relative_to(cache_dir)
        ):
            return cause
    return None


def _json_of(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if TABLE_READERS.get(file.suffix) == "json"]


def _refuse_settings(section: CorpusSection, source: str, names: Sequence[str]) -> None:
    given = [f"corpus.{name}" for name in names if getattr(section, name) is not None]
    if given:
        raise CorpusError(
            f"{' and '.join(given)} mean nothing for {source} ({section.dataset}); leave them out"
        )
