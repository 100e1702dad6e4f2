"""Heartbeats of ranks, and what a group of ranks and the coordinator tell one another: values that
travel between processes."""

from dataclasses import dataclass
from typing import Literal

# Loading, reading a chunk that is there, waiting for chunks, computing, scoring held-out text,
# copying its state, waiting for the store.
Phase = Literal["start", "reading", "data", "step", "evaluate", "snapshot", "commit"]
Cause = Literal["died", "stalled", "notice", "grown", "stop"]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A rank's heartbeat: where it is, and what it does."""

    group: str  # the role that it trains
    rank: int
    world_size: int  # ranks in its group
    node: str  # Ray's node id
    pid: int
    step: int  # the current one, counted from 1
    phase: Phase
    phase_s: float  # seconds since it entered the phase
    stack: str = ""  # of its threads, once the phase lasts too long
    chunk: int | None = None  # that it is reading


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat, and its age by the coordinator's clock."""

    heartbeat: Heartbeat
    ago_s: float


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A request to a group to commit what it has and to leave: before its machine ends (notice), to
    come back larger (grown), or for good (stop)."""

    cause: Cause
    seconds_left: float  # to commit and to leave, from when this was received
    detail: str


@dataclass(frozen=True, slots=True)
class PreviousAttempt:
    """How the group's attempt before this one ended."""

    cause: Cause
    detail: str
    last_step: int  # taken before the end
    seconds_ago: float  # since this step was taken, when the next attempt began
    # attempts in a row that were lost without a new commit, the previous one included
    num_failures: int
