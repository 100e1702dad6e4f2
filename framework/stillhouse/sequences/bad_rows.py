"""Bad rows: rows of a corpus that cannot be learnt from, which are skipped up to a share of all."""

from stillhouse.errors import CorpusError


class BadRowError(CorpusError):
    """A row cannot become tokens. Its message begins behind the words 'row 7 of a.jsonl: '."""
