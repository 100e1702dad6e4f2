"""Types of settings: the ranges, and the base class of every section.

A range ends where a value can only be a mistake, far above what any run has used.
"""

import reprlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
BatchSize = Annotated[int, Field(ge=1, le=1 << 24)]
BlockSize = Annotated[int, Field(ge=1, le=1 << 24)]  # the logits of more tokens are terabytes
NumBytes = Annotated[int, Field(ge=1, le=1 << 53)]  # every JSON reader is exact up to there
NumProcesses = Annotated[int, Field(ge=1, le=1 << 16)]  # more than any Ray cluster has held
Amount = Annotated[float, Field(gt=0.0, le=1 << 16)]  # of a Ray resource, for one process
Seconds = Annotated[float, Field(gt=0.0, le=1e9)]  # 31 years
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]  # what torch takes
# a step of Adam moves each weight by about the learning rate, and most weights are below 1
LearningRate = Annotated[float, Field(gt=0.0, le=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
LossWeight = Annotated[float, Field(ge=0.0, le=1000.0)]
Dtype = Literal["float32", "bfloat16", "float16"]
NoticeSource = Literal["auto", "aws", "gcp", "azure", "off"]
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


# the variants of a setting that is a word or a table; pydantic names them in an error's place
WORD, TABLE = "a word", "a table"


class Section(BaseModel):
    """A section of the configuration: frozen, and closed to unknown names."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, str_strip_whitespace=True, allow_inf_nan=False
    )


def shown(value: object) -> str:
    """A value as Python writes it, on one line of about 100 characters at most."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)
