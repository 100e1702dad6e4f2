"""Documents in their shuffled order, whatever they come from; the same section over the same data gives the same order on every machine.

This is the only door to `datasets`. A document is a text, or for chat a list of messages.
"""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError

TEXT_SUFFIXES = frozenset({".txt", ".text", ".py", ".md"})
TABLE_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Documents:
    """`order[i]` is the row, in the source, of document i; `read` fetches rows; `identity` changes whenever a document may have changed."""

    identity: str
    order: NDArray[np.int64]
    read: Callable[[Sequence[int]], list[Any]]

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, size: int) -> Iterator[tuple[list[int], list[Any]]]:
        """(rows, documents), `size` of them at a time, in order."""
        for start in range(0, len(self.order), size):
            rows = self.order[start : start + size].tolist()
            yield rows, self.read(rows)


def load_documents(section: CorpusSection, *, cache_dir: str | Path) -> Documents:
    """The documents that a section names, shuffled by its seed; `cache_dir` holds what local tables are converted to.

    Raises CorpusError: absent, unreadable, streamed or empty data, a missing column, a setting that means nothing for the source.
    """
    if section.dataset == "stdlib":
        _refuse_settings(section, "the standard library", ("subset", "revision"))
        return _from_files(_stdlib_files(), section)
    if not looks_like_path(section.dataset):
        return from_dataset(_load(section.dataset, section, name=section.subset, revision=section.revision), section)
    _refuse_settings(section, "local files", ("subset", "revision"))
    files = _local_files(section.dataset)
    if files[0].suffix in TEXT_SUFFIXES:
        return _from_files(files, section)
    reader = TABLE_READERS[files[0].suffix]
    return from_dataset(_load(reader, section, data_files=[str(file) for file in files], cache_dir=str(cache_dir)), section)


def from_dataset(dataset: object, section: CorpusSection) -> Documents:
    """The documents of a loaded data set's column. Raises CorpusError: streamed or empty data, a missing column."""
    if not isinstance(dataset, datasets.Dataset):
        raise CorpusError(
            f"the data set {section.dataset} came as {type(dataset).__name__}, whose length is not known;"
            " a fixed order needs a data set on disk: load it without streaming, with one split"
        )
    column = section.text_column
    if column not in dataset.column_names:
        raise CorpusError(
            f"the data set {section.dataset} has no column '{column}'; it has {', '.join(sorted(dataset.column_names))}: set corpus.column"
        )
    rows = dataset.select_columns([column])
    return _shuffled(len(rows), lambda numbers: list(rows[numbers][column]), f"datasets:{dataset._fingerprint}:{column}", section)


def looks_like_path(name: str) -> bool:
    """Whether `name` is meant as a local path: it starts as one, is a glob, ends in a suffix that we read, or exists."""
    is_explicit = name.startswith(("/", ".", "~")) or any(mark in name for mark in "*?[")
    return is_explicit or Path(name).suffix in TEXT_SUFFIXES | TABLE_READERS.keys() or Path(name).exists()


def shuffled_order(num_items: int, purpose: Literal["corpus", "sequence"], *, seed: int) -> NDArray[np.int64]:
    """A permutation of a corpus's documents or sequences, a function of these arguments alone: NumPy's own may change between versions.

    Items are sorted by splitmix64 (Steele, Lea and Flood, 2014) of their number and the seed.
    """
    start = int.from_bytes(hashlib.sha256(f"stillhouse {purpose} order {seed}".encode()).digest()[:8], "little")
    mixed = np.arange(1, num_items + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable").astype(np.int64)


def _shuffled(num_documents: int, read: Callable[[Sequence[int]], list[Any]], identity: str, section: CorpusSection) -> Documents:
    if num_documents == 0:
        raise CorpusError(f"the data set {section.dataset} is empty; name one with documents in split '{section.split}'")
    order = shuffled_order(num_documents, "corpus", seed=section.seed)
    return Documents(identity, order[: section.max_documents], read)


def _from_files(files: Sequence[Path], section: CorpusSection) -> Documents:
    if section.format == "chat":
        raise CorpusError(
            f'{section.dataset} holds plain text files, which have no conversations; set corpus.format = "text", or name a json, jsonl,'
            " parquet or arrow file with a column of messages"
        )
    if section.split != "train":
        raise CorpusError(f"{section.dataset} holds plain text files, which have no split '{section.split}'; leave corpus.split at 'train'")
    if section.text_column != "text":
        raise CorpusError(f"{section.dataset} holds plain text files, whose one column is 'text'; found corpus.column = '{section.column}'")
    stats = [(str(file), file.stat()) for file in files]
    listing = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    identity = "files:" + hashlib.sha256(listing.encode()).hexdigest()
    return _shuffled(len(files), lambda numbers: [_read_text(files[number]) for number in numbers], identity, section)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it or leave it out") from None
    except OSError as error:
        raise CorpusError(f"cannot read {file}: {error.strerror}") from None


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in root.rglob("*.py") if NOT_STDLIB.isdisjoint(file.relative_to(root).parts))
    return [file for file in sorted(files) if _is_utf8(file)]


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def _local_files(name: str) -> list[Path]:
    """The files that a path, directory or glob names, sorted, all of one kind."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and file.suffix in TEXT_SUFFIXES | TABLE_READERS.keys()]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
    if not found:
        what = "holds no file that can be read" if path.is_dir() else "does not exist"
        raise CorpusError(
            f"the corpus {name} {what}; give a file, glob or directory of {', '.join(sorted(TEXT_SUFFIXES | TABLE_READERS.keys()))},"
            " a hub name such as 'owner/name', or 'stdlib'"
        )
    kinds = {"text" if file.suffix in TEXT_SUFFIXES else TABLE_READERS.get(file.suffix, file.suffix) for file in found}
    unknown = kinds - {"text", *TABLE_READERS.values()}
    if unknown:
        raise CorpusError(
            f"{name} ends in '{sorted(unknown)[0]}', which is not read; wanted: {', '.join(sorted(TEXT_SUFFIXES | TABLE_READERS.keys()))}"
        )
    if len(kinds) > 1:
        raise CorpusError(
            f"{name} holds files of several kinds ({', '.join(sorted(kinds))}); name one kind with a glob such as '{name}/**/*.txt'"
        )
    return sorted(file.resolve() for file in found)


def _load(
    path: str,
    section: CorpusSection,
    *,
    name: str | None = None,
    revision: str | None = None,
    data_files: list[str] | None = None,
    cache_dir: str | None = None,
) -> object:
    try:
        return datasets.load_dataset(path, name, split=section.split, revision=revision, data_files=data_files, cache_dir=cache_dir)
    except StopIteration:  # what the reader of json makes of files without a byte
        raise CorpusError(f"the data set {section.dataset} is empty; name one with documents in split '{section.split}'") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        reason = f"{error}" if error.__cause__ is None else f"{error}: {error.__cause__}"
        hint = "" if data_files else "; check name, subset and split, and for a gated or private one run `hf auth login` or set HF_TOKEN"
        raise CorpusError(f"the data set {section.dataset} cannot be loaded: {reason}{hint}") from error


def _refuse_settings(section: CorpusSection, source: str, names: Sequence[str]) -> None:
    given = [f"corpus.{name}" for name in names if getattr(section, name) is not None]
    if given:
        raise CorpusError(f"{' and '.join(given)} mean nothing for {source} ({section.dataset}); leave them out")
