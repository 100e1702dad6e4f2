"""The account of a corpus: what became of its documents when they were tokenised."""

import json
from dataclasses import asdict, dataclass, field

from stillhouse.sequences.bad_rows import BadRow, where
from stillhouse.sequences.chat import Way
from stillhouse.tracking.samples import SampleAccount


@dataclass(slots=True)
class Account:
    """What was tokenised so far; kept beside the corpus."""

    num_documents: int = 0
    num_tokens: int = 0
    num_labels: int = 0  # tokens that a model is to learn to predict
    form: str = ""  # what was read of a row, in words
    bad_rows: list[BadRow] = field(default_factory=list)  # that were skipped
    ways: dict[str, int] = field(default_factory=dict)  # conversations told in each `Way`
    left_out: dict[str, int] = field(default_factory=dict)  # rows that are not wanted, by reason
    samples: SampleAccount | None = None  # where the documents are what a model wrote

    def lines(self) -> list[str]:
        """What people should know of it: what was read, what is learnt, what was skipped."""
        lines = [f"{self.num_documents:,} documents: {self.form}"]
        lines += [f"in {count:,} of them {Way(way).words}" for way, count in self.ways.items()]
        lines += [f"left out: {count:,} {reason}" for reason, count in self.left_out.items()]
        if self.bad_rows:
            first = self.bad_rows[0]
            lines.append(
                f"bad rows that are skipped: {len(self.bad_rows):,}, the first: "
                f"{where(first.file, first.row)}: {first.reason}"
            )
        return lines

    def bad_rows_file(self) -> bytes:
        """A JSON object of file, row and reason for each bad row, on a line of its own."""
        return "".join(json.dumps(asdict(row)) + "\n" for row in self.bad_rows).encode()
