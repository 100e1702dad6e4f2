"""The events of `stillhouse generate`. Those of its pool are the ones of teachers: what they call
chunks are shards here."""

from dataclasses import dataclass
from typing import ClassVar

from stillhouse.tracking.events import RunEvent


@dataclass(frozen=True, slots=True)
class GenerationEvent(RunEvent):
    """An attempt begins: the first event, and again after each resume."""

    kind: ClassVar[str] = "generation"
    attempt: int  # counts from 1
    command: str  # as the user typed it
    versions: dict[str, str]  # package -> version
    writer: str
    recipe_fingerprint: str  # 64 hex digits
    num_shards: int
    num_prompts: int
    samples: int  # of each prompt
    num_writers: int  # replicas asked for
    bad_rows: int  # of the prompts' data set, that were skipped


@dataclass(frozen=True, slots=True)
class WriterEvent(RunEvent):
    """A writer replica has passed its start-up check."""

    kind: ClassVar[str] = "writer"
    replica: int
    seconds_to_ready: float
    device: str


@dataclass(frozen=True, slots=True)
class ShardEvent(RunEvent):
    """A writer published a shard of rollouts."""

    kind: ClassVar[str] = "shard"
    shard: int
    num_tokens: int  # that were sampled
    num_bytes: int
    num_ended: int  # samples that ended themselves
    num_cut: int  # samples that were cut at the most tokens
    num_set_aside: int  # samples of prompts that no writer could answer
    seconds: float  # from the arrival of the prompts to the published shard
    replica: int
    duplicate: bool  # another publisher was there first
    num_with_logprobs: int = 0  # samples that have log-probabilities from a server


@dataclass(frozen=True, slots=True)
class CostEvent(RunEvent):
    """What a server's answers came to, of all commands that wrote by the recipe."""

    kind: ClassVar[str] = "cost"
    granted_usd: float  # spent, or reserved by a process that was lost
    limit_usd: float
