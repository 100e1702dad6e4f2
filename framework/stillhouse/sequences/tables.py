"""Tables: data sets of the hub and local files as rows that are read one by one. No other module
imports `datasets`."""

import glob
import logging
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse import atomic
from stillhouse.cache import is_no_room, unwritable, writing_cache
from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.bad_rows import BadRowError
from stillhouse.sequences.lines import COMPRESSIONS, KINDS, kind_of, lines_of, suffix_of

TEXT_SUFFIXES = frozenset({".txt", ".text", ".py", ".md"})
_ARROW_READERS = {".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = frozenset(
    {*TEXT_SUFFIXES, *_ARROW_READERS, *KINDS}
    | {kind + compression for kind in KINDS for compression in COMPRESSIONS}
)
_LOADING_ERRORS = (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException)

# It logs an error that is raised here, too.
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)

ReadRow = Callable[[int], Mapping[str, Any]]  # the columns of a row by name; raises BadRowError


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of columns."""

    identity: str  # another one whenever a row may have changed
    num_rows: int
    columns: Collection[str]
    reader: Callable[[Sequence[str]], ReadRow]  # of these columns of a row
    place: Callable[[int], tuple[str, int]]  # a row's file or data set, and its number there


def looks_like_path(name: str) -> bool:
    """Whether `name` is meant as a local path: it starts as one, is a glob, ends in a suffix that
    is read, or exists."""
    is_explicit = name.startswith(("/", ".", "~")) or any(mark in name for mark in "*?[")
    return is_explicit or suffix_of(Path(name)) in SUFFIXES or Path(name).exists()


def local_files(name: str) -> list[Path]:
    """The files that a path, directory or glob names, sorted, all of one kind."""
    # Find them.
    path = Path(name).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and suffix_of(file) in SUFFIXES]
    elif path.is_file():
        found = [path]
    else:
        matches = map(Path, glob.glob(str(path), recursive=True))
        found = [match for match in matches if match.is_file()]
    suffixes = ", ".join(sorted(SUFFIXES))
    if not found:
        what = "holds no file that can be read" if path.is_dir() else "does not exist"
        raise CorpusError(
            f"the corpus {name} {what}; give a file, glob or directory of {suffixes}, a hub name "
            "such as 'owner/name', or 'stdlib'"
        )

    # Refuse files of an unknown kind, or of several kinds.
    kinds = {
        "text" if file.suffix in TEXT_SUFFIXES else kind_of(file) or suffix_of(file)
        for file in found
    }
    unknown = kinds - {"text", *KINDS.values(), *_ARROW_READERS}
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


def table_of_files(files: Sequence[Path], section: CorpusSection, *, cache_dir: Path) -> Table:
    """Local files of one kind as a table; what is not mapped in place is copied to `cache_dir`."""
    if kind_of(files[0]) is None:
        dataset = _load_arrow(files, section, cache_dir)
        return table_of_dataset(dataset, section, files=files)

    # JSON and CSV, and the part of it that the section asks for.
    lines = lines_of(files, cache_dir=cache_dir)
    if not len(lines):
        raise is_empty(section)
    try:
        wanted = datasets.ReadInstruction.from_spec(section.split)
        parts = wanted.to_absolute({"train": len(lines)})
    except (ValueError, AssertionError) as error:
        raise CorpusError(f"the data set {section.dataset} cannot be loaded: {error}") from None
    ranges = [range(part.from_, part.to) for part in parts]
    ends = list(accumulate(map(len, ranges)))

    def at(row: int) -> int:
        number = bisect_right(ends, row)
        return ranges[number][row - ends[number]]

    def reader(columns: Sequence[str]) -> ReadRow:
        def read(row: int) -> Mapping[str, Any]:
            found = lines.read(at(row))
            return {name: found.get(name) for name in columns}

        return read

    return Table(
        f"lines:{lines.digest}:{section.split}",
        ends[-1],
        lines.columns(section.column),
        reader,
        lambda row: lines.place(at(row)),
    )


def table_from_hub(section: CorpusSection) -> Table:
    """A data set of the hub."""
    try:
        dataset = datasets.load_dataset(
            section.dataset, section.subset, split=section.split, revision=section.revision
        )
    except StopIteration:
        raise is_empty(section) from None
    except _LOADING_ERRORS as error:
        raise CorpusError(
            f"the data set {section.dataset} cannot be loaded: {_reason_of(error)}; "
            f"{cure_of_hub(error)}"
        ) from error
    return table_of_dataset(dataset, section)


def table_of_dataset(
    dataset: object, section: CorpusSection, *, files: Sequence[Path] = ()
) -> Table:
    """A loaded data set; `files` are the local ones that it was loaded from.

    Raises CorpusError for one that is streamed.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise CorpusError(
            f"the data set {section.dataset} came as {type(dataset).__name__}, whose length is "
            "not known; a fixed order needs a data set on disk: load it without streaming, with "
            "one split"
        )

    def place(row: int) -> tuple[str, int]:
        if not files or section.split != "train":
            return section.dataset, row
        ends = _ends_of(tuple(files))
        number = bisect_right(ends, row)
        return str(files[number]), row - (ends[number - 1] if number else 0)

    identity = f"datasets:{dataset._fingerprint}"
    reader = partial(_reader_of_dataset, dataset)
    return Table(identity, len(dataset), dataset.column_names, reader, place)


def _reader_of_dataset(dataset: datasets.Dataset, columns: Sequence[str]) -> ReadRow:
    rows = dataset.select_columns(list(columns))

    def read(row: int) -> Mapping[str, Any]:
        try:
            found = rows[row]
        except UnicodeDecodeError as error:  # a table's texts are bytes, decoded only here
            reason = f"not UTF-8 text ({error.reason}); convert or remove it"
            raise BadRowError(reason) from None
        return {name: _as_in_its_file(each) for name, each in found.items()}

    return read


@lru_cache(maxsize=1)
def _ends_of(files: tuple[Path, ...]) -> list[int]:
    """Rows in Parquet or Arrow files up to each of them."""
    return list(accumulate(_num_rows(file) for file in files))


def _num_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        return int(pq.read_metadata(file).num_rows)
    return int(datasets.Dataset.from_file(str(file)).num_rows)


def _load_arrow(files: Sequence[Path], section: CorpusSection, cache_dir: Path) -> object:
    """A data set of local Parquet or Arrow files, which `datasets` converts to Arrow files in
    `cache_dir`."""
    reader, names = _ARROW_READERS[files[0].suffix], [str(file) for file in files]
    with writing_cache(cache_dir):
        atomic.make_directory(cache_dir)
    try:
        return datasets.load_dataset(
            reader, split=section.split, data_files=names, cache_dir=str(cache_dir)
        )
    except _LOADING_ERRORS as error:
        if (failed_write := _failed_write(error, cache_dir)) is not None:
            raise unwritable(cache_dir, failed_write) from error
        broken = next((file for file in files if not _is_sound(file)), None)
        if broken is not None:
            raise CorpusError(
                f"the corpus cannot be read: {broken} is damaged or cut short "
                f"({_reason_of(error)}); write or fetch the file again"
            ) from error
        raise CorpusError(
            f"the data set {section.dataset} cannot be loaded: {_reason_of(error)}"
        ) from error


def _is_sound(file: Path) -> bool:
    try:
        _num_rows(file)
    except _LOADING_ERRORS:
        return False
    return True


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


def is_empty(section: CorpusSection) -> CorpusError:
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
