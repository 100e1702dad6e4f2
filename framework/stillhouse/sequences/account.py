"""The account of a corpus: what became of its documents when they were tokenised."""

from dataclasses import dataclass, field

from stillhouse.sequences.bad_rows import BadRow


@dataclass(slots=True)
class Account:
    """What was tokenised so far; kept beside the corpus."""

    num_documents: int = 0
    num_tokens: int = 0
    num_labels: int = 0  # tokens that a model is to learn to predict
    form: str = ""  # what was read of a row, in words
    bad_rows: list[BadRow] = field(default_factory=list)  # that were skipped
    ways: dict[str, int] = field(default_factory=dict)  # conversations told in each `Way`
