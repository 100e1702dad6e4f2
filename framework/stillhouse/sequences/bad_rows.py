"""Bad rows: rows of a corpus that cannot be learnt from, which are skipped up to a share of all;
and rows that are not wanted, which are left out however many they are."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.errors import CorpusError

_SHOWN = 3


class BadRowError(CorpusError):
    """A row cannot become tokens. Its message begins behind the words 'row 7 of a.jsonl: '."""


class LeftOutError(CorpusError):
    """A row is sound, and is not wanted. Its message is the reason, the same for all such rows."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was skipped: its file or data set, its number there from 0, and why."""

    file: str
    row: int
    reason: str


def where(file: str, row: int) -> str:
    return f"row {row} of {file}"


def require_text(text: str) -> str:
    """The text. Raises BadRowError where it cannot be written as UTF-8: JSON may hold half of a
    surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"not UTF-8 text ({error.reason}); convert or remove it") from None
    return text


def require_few(bad: Sequence[BadRow], *, num_rows: int, max_share: float) -> None:
    """Raise CorpusError where there are more bad rows than a share of all."""
    most = int(max_share * num_rows)
    if len(bad) <= most:
        return
    shown = [f"{where(each.file, each.row)}: {each.reason}" for each in bad[:_SHOWN]]
    begin = shown[0]
    if len(bad) > 1:
        begin = f"{len(bad)} rows are bad; the first of them:\n  " + "\n  ".join(shown) + "\n"
    raise CorpusError(
        f"{begin} (corpus.max_bad_rows = {max_share:g} allows {most} of {num_rows:,} rows; mend or "
        "remove bad ones, or raise it to skip them)"
    )
