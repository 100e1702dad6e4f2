"""Where JSON files are broken: the file and line of the first value that cannot be read."""

import json
from collections.abc import Sequence
from pathlib import Path


def first_fault(files: Sequence[Path]) -> str | None:
    """The first line that is not UTF-8, not JSON or not an object, with its file, its number from 1
    and a cure; None where there is none.

    For use after a library has failed at the files: its error names neither file nor line.
    """
    return next((fault for file in files if (fault := _fault_of(file)) is not None), None)


def _fault_of(file: Path) -> str | None:
    with file.open("rb") as stream:
        is_list = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        stream.seek(0)
        if is_list:  # the whole file is one value
            return _fault(stream.read(), file, first_line=1, is_list=True)
        for number, line in enumerate(stream, 1):
            fault = _fault(line, file, first_line=number, is_list=False) if line.strip() else None
            if fault is not None:
                # One object may take many lines.
                whole = file.read_bytes() if number == 1 else line
                return _fault(whole, file, first_line=number, is_list=False) and fault
    return None


def _fault(data: bytes, file: Path, *, first_line: int, is_list: bool) -> str | None:
    """What is wrong with bytes that should be one JSON value, a list or an object."""
    wanted = "a list of objects" if is_list else "one JSON object on each line"
    line = first_line
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        return (
            f"{file}, line {line}: not UTF-8 text ({error.reason}); convert the file to UTF-8, "
            "or remove the line"
        )
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        found = f"not JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        found = "JSON nested too deep"
    else:
        if isinstance(value, list if is_list else dict):
            return None
        found = f"a {type(value).__name__}"
    return f"{file}, line {line}: {found}; wanted: {wanted}. Mend or remove the line"
