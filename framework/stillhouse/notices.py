"""Notices: a machine says that it will be taken away, and by when."""

from dataclasses import dataclass
from typing import Literal

Source = Literal["aws", "gcp", "azure", "sigterm", "ray"]


@dataclass(frozen=True, slots=True)
class Notice:
    """The end of a machine, announced. What it holds has to be safe elsewhere by `deadline`."""

    source: Source
    deadline: float  # unix seconds
    detail: str  # what was announced, in the source's own words
