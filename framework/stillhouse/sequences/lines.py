"""JSON and CSV files as rows that are read one by one, each exactly as it was written.

Their rows are copied once, as lines of JSON, to one file in the cache, whatever the files were
compressed with. A row that is no JSON is found when it is read: it is a bad row, and no bad file.
"""

import csv
import hashlib
import io
import json
import shutil
import sys
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillhouse import atomic
from stillhouse.cache import writing_cache
from stillhouse.errors import CorpusError
from stillhouse.sequences.bad_rows import BadRowError
from stillhouse.sequences.corpus import mapped

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv"}
_LAYOUT = 1  # a change to the files in the cache raises it
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Lines:
    """The rows of some files, one after the other."""

    files: tuple[Path, ...]
    ends: tuple[int, ...]  # rows in the files up to each of them
    path: str  # their lines
    places_path: str  # int64 [N, 3]: where each line begins and ends, and its number in its file
    digest: str  # another one whenever a file may have changed

    def __len__(self) -> int:
        return self.ends[-1]

    def place(self, row: int) -> tuple[str, int]:
        """A row's file, and its number there from 0."""
        number = bisect_right(self.ends, row)
        return str(self.files[number]), row - (self.ends[number - 1] if number else 0)

    def read(self, row: int) -> Mapping[str, Any]:
        """Raises BadRowError where the row is no object of JSON, or not all of a row of CSV."""
        start, stop, number = mapped(self.places_path)[row].tolist()
        with open(self.path, "rb") as lines:
            lines.seek(start)
            value, fault = _parsed(lines.read(stop - start), first_line=number)
        if isinstance(value, dict):
            return value
        file = Path(self.place(row)[0])
        if kind_of(file) == "csv":
            header, fields = value
            raise BadRowError(f"it has {fields} fields, where the header of {file} has {header}")
        raise BadRowError(
            f"the corpus cannot be read: {file}, "
            f"{fault or f'line {number}: a {type(value).__name__}'}; wanted: one JSON object on "
            "each line. Mend or remove the line"
        )

    def columns(self, wanted: str | None) -> list[str]:
        """The names in the first rows, and in as many more as it takes to find `wanted`."""
        names: dict[str, None] = {}
        for row in range(len(self)):
            if row >= 100 and (wanted is None or wanted in names):
                break
            try:
                names |= dict.fromkeys(self.read(row))
            except BadRowError:
                continue
        return list(names)


def suffix_of(file: Path) -> str:
    """A file's suffix, with that of its compression behind it."""
    return "".join(file.suffixes[-2:]) if file.suffix in COMPRESSIONS else file.suffix


def kind_of(file: Path) -> str | None:
    """json or csv; None for a file of another kind."""
    return KINDS.get(suffix_of(file).removesuffix(file.suffix) or file.suffix)


def lines_of(files: Sequence[Path], *, cache_dir: Path) -> Lines:
    """The rows of JSON and CSV files, copied into `cache_dir` or found there.

    Raises CorpusError for a file that is cut short, or no JSON or CSV as a whole; CacheError where
    `cache_dir` cannot be written.
    """
    stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps([_LAYOUT, stats]).encode()).hexdigest()
    directory = cache_dir / digest[:32]
    if (found := _found(directory, files, digest)) is not None:
        return found
    with writing_cache(cache_dir):
        atomic.make_directory(cache_dir)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=cache_dir))
        try:
            _copy(files, building)
            with atomic.one_at_a_time(cache_dir):  # or one would remove what another has moved
                if _found(directory, files, digest) is None:
                    shutil.rmtree(directory, ignore_errors=True)  # a damaged one
                    atomic.move_directory(building, directory)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    found = _found(directory, files, digest)
    assert found is not None
    return found


def _found(directory: Path, files: Sequence[Path], digest: str) -> Lines | None:
    """What was copied before; None where it is not there whole."""
    path, places = directory / "lines", directory / "places.npy"
    try:
        ends = tuple(json.loads((directory / "ends.json").read_text()))
        places_N3 = mapped(str(places))
        size = int(places_N3[-1, 1]) if len(places_N3) else 0
        is_whole = (len(places_N3), path.stat().st_size) == (ends[-1], size)
    except (OSError, ValueError, IndexError):
        return None
    return Lines(tuple(files), ends, str(path), str(places), digest) if is_whole else None


def _copy(files: Sequence[Path], directory: Path) -> None:
    places, ends = array("q"), []
    with (directory / "lines").open("wb") as sink:
        for file in files:
            for number, line in _rows(file):
                start = sink.tell()
                places.extend((start, start + sink.write(line), number))
            ends.append(len(places) // 3)
    np.save(directory / "places.npy", np.frombuffer(places, np.int64).reshape(-1, 3))
    (directory / "ends.json").write_text(json.dumps(ends))


# ---- from files to rows


def _rows(file: Path) -> Iterator[tuple[int, bytes]]:
    """Each row as a line of JSON, and the number from 1 of its line in the file, or of the row
    where the file is no lines."""
    compression = COMPRESSIONS.get(file.suffix)
    try:
        with (
            pa.input_stream(str(file), compression=compression) as unpacked,
            io.BufferedReader(unpacked, 1 << 20) as stream,
        ):
            yield from (_csv_rows if kind_of(file) == "csv" else _json_rows)(file, stream)
    except OSError as error:
        raise CorpusError(
            f"the corpus cannot be read: {file} is damaged or cut short ({error}); write or fetch "
            "the file again"
        ) from error


def _json_rows(file: Path, stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """The lines of a file; the items of one that is a list; or a file that is one object."""
    lines = enumerate(stream, 1)
    for number, line in lines:
        line = line.removeprefix(_BOM) if number == 1 else line
        if not line.strip():
            continue
        # the first line with something in it decides
        rest = b""
        if line.lstrip().startswith(b"[") or _parsed(line, first_line=number)[1] is not None:
            rest = b"".join(line for _, line in lines)
            whole, fault = _parsed(line + rest, first_line=number)
            if isinstance(whole, list):
                yield from enumerate(map(_item, whole), 1)
                return
            if line.lstrip().startswith(b"["):
                raise CorpusError(
                    f"the corpus cannot be loaded: {file}, {fault}; wanted: a list of objects. "
                    "Mend or remove the line"
                )
            if fault is None:
                yield number, json.dumps(whole).encode()
                return
        yield number, line
        lines_left = enumerate(io.BytesIO(rest), number + 1) if rest else lines
        yield from ((at, each) for at, each in lines_left if each.strip())
        return


def _item(item: Any) -> bytes:
    """An item of a list as a line; a text stands for an object that has it as `text`."""
    return json.dumps({"text": item} if isinstance(item, str) else item).encode()


def _csv_rows(file: Path, stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Every field is text, as it stands in the file. A row of another number of fields than the
    header becomes a list of both numbers."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB of the default
    reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    try:
        header = next(reader, [])
        for number, fields in enumerate((each for each in reader if each), 1):
            row: Any = dict(zip(header, fields, strict=False))
            if len(fields) != len(header):
                row = [len(header), len(fields)]
            yield number, json.dumps(row).encode()
    except (csv.Error, UnicodeDecodeError) as error:
        cure = (
            "convert the file to UTF-8"
            if isinstance(error, UnicodeDecodeError)
            else "the file may be cut short: mend it, or write it again"
        )
        raise CorpusError(
            f"the corpus cannot be read: {file}, line {reader.line_num}: not CSV of UTF-8 text "
            f"({error}); {cure}"
        ) from None


def _parsed(data: bytes, *, first_line: int) -> tuple[Any, str | None]:
    """A value of JSON, or None and what is wrong, with its line."""
    try:
        return json.loads(data.decode("utf-8-sig")), None
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        return None, (
            f"line {line}: not UTF-8 text ({error.reason}); convert the file to UTF-8, or remove "
            "the line"
        )
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        return None, f"line {line}: not JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        return None, f"line {first_line}: JSON nested too deep"
