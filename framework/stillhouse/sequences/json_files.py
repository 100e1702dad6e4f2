"""Where JSON files are broken: the file and line of the first value that no reader can read."""

import json
from collections.abc import Sequence
from pathlib import Path


def first_fault(files: Sequence[Path]) -> str | None:
    """The first line that is not UTF-8, not JSON or not an object, with its file, its number from 1
    and a cure; None: there is none.

    It is called once a library has failed at the files, which names neither.
    """
    return next((fault for file in files if (fault := _fault_of(file)) is not None), None)


def _fault_of(file: Path) -> str | None:
    with file.open("rb") as stream:
        is_list = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        stream.seek(0)
        if is_list:  # one value all over the file
            return _fault(stream.read(), file, first_line=1, is_list=True)
        for number, line in enumerate(stream, 1):
            if (
                line.strip()
                and (fault := _fault(line, file, first_line=number, is_list=False)) is not None
            ):
                is_one_object = (
                    number == 1
                    and _fault(file.read_bytes(), file, first_line=1, is_list=False) is None
                )
                return None if is_one_object else fault  # one object may take many lines
    return None


def _fault(data: bytes, file: Path, *, first_line: int, is_list: bool) -> str | None:
    """What is wrong with bytes that are one JSON value, a list or an object."""
    wanted = "a list of objects" if is_list else "one JSON object on each line"
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        return (
            f"{file}, line {line}: not UTF-8 text ({error.reason}); convert the file to UTF-8, "
            "or remove the line"
        )
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        return (
            f"{file}, line {line}: not JSON ({error.msg}, column {error.colno}); wanted: "
            f"{wanted}. Mend or remove the line"
        )
    except RecursionError:
        return (
            f"{file}, line {first_line}: JSON nested too deep; wanted: {wanted}. Mend or "
            "remove the line"
        )
    if not isinstance(value, list if is_list else dict):
        return (
            f"{file}, line {first_line}: a {type(value).__name__}; wanted: {wanted}. Mend or "
            "remove the line"
        )
    return None
