"""The account of a corpus: what became of its documents when they were tokenised."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Account:
    """What was tokenised so far; kept beside the corpus."""

    num_documents: int = 0
    num_tokens: int = 0
    num_labels: int = 0  # tokens that a model is to learn to predict
    ways: dict[str, int] = field(default_factory=dict)  # conversations told in each `Way`
