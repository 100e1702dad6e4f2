"""The watchdog: which rank holds its group up, and which group is too small, by heartbeats alone.

Pure functions: the heartbeats carry the times. A collective makes all ranks wait for the slowest,
so most ranks that stand still wait for another one. The one to blame is silent, or it is the one
that got least far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.cluster.heartbeat import Heard, Heartbeat

_START_ALLOWANCE = 10.0  # loading a model may take this many times what a step may
# how far a rank got in a step; one that has its chunks waits for the others in "data", too
_ORDER = ("start", "reading", "data", "step", "evaluate", "snapshot", "commit")
_PATIENT = ("data", "commit")  # teachers may need long, and so may the store


@dataclass(frozen=True, slots=True)
class Stall:
    """A rank that holds its group up."""

    heartbeat: Heartbeat  # its last
    seconds: float  # without a heartbeat, or in the phase
    silent: bool


def stalled(heard: Sequence[Heard], *, patience_s: float) -> Stall | None:
    """The rank to blame, where one has been silent or in one phase for longer than `patience_s`;
    else None.

    A rank that waits for chunks to be made, or for the store, may wait for as long as they need. A
    rank that reads a chunk which is there may not.
    """
    # silent
    silent = max(heard, key=lambda each: each.ago_s, default=None)
    if silent is not None and silent.ago_s > patience_s:
        return Stall(silent.heartbeat, silent.ago_s, silent=True)
    # least far
    heartbeats = [each.heartbeat for each in heard]
    last = min(heartbeats, key=lambda h: (h.step, _ORDER.index(h.phase), -h.phase_s), default=None)
    if last is None or last.phase in _PATIENT:
        return None
    allowed_s = patience_s * (_START_ALLOWANCE if last.phase == "start" else 1.0)
    return Stall(last, last.phase_s, silent=False) if last.phase_s > allowed_s else None


def has_shrunk(heard: Sequence[Heard], *, num_workers: int) -> bool:
    """Whether a whole group is training that was made with fewer ranks than `num_workers`.

    Only an elastic group is ever made smaller. While a rank of it has sent no heartbeat, or is
    before its first step, the group is starting.
    """
    is_whole = bool(heard) and len(heard) == heard[0].heartbeat.world_size
    return is_whole and len(heard) < num_workers and all(each.heartbeat.step > 0 for each in heard)
