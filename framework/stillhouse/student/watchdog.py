"""The watchdog: which rank holds its group up, and which group is too small, told from heartbeats
alone. Pure: time is in what was heard.

A collective makes all ranks wait for the slowest, so most of those that stand still are waiting for
another. The one to blame is silent, or it is the one that got least far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.cluster.heartbeat import Heard, Heartbeat

_START_ALLOWANCE = 10.0  # loading a model may take this many times what a step may
# who has its chunks waits for the others in phase "data", too
_ORDER = (
    "start",
    "reading",
    "data",
    "step",
    "snapshot",
    "commit",
)
_PATIENT = ("data", "commit")  # teachers may need long, and so may the store


@dataclass(frozen=True, slots=True)
class Stall:
    """A rank that holds its group up."""

    heartbeat: Heartbeat  # its last
    seconds: float  # without a heartbeat, or in the phase
    silent: bool


def stalled(heard: Sequence[Heard], *, patience_s: float) -> Stall | None:
    """The rank to blame, if one is silent or stands still for longer than `patience_s`; None while
    all is well.

    A rank that waits for chunks to be made, or for the store, stands still for as long as they
    need: the group is not stalled then. One that reads a chunk which is there does not.
    """
    silent = max(heard, key=lambda each: each.ago_s, default=None)
    if silent is not None and silent.ago_s > patience_s:
        return Stall(silent.heartbeat, silent.ago_s, silent=True)
    last = min(
        heard,
        key=lambda each: (
            each.heartbeat.step,
            _ORDER.index(each.heartbeat.phase),
            -each.heartbeat.phase_s,
        ),
        default=None,
    )
    if last is None or last.heartbeat.phase in _PATIENT:
        return None
    allowed_s = patience_s * (_START_ALLOWANCE if last.heartbeat.phase == "start" else 1.0)
    return (
        Stall(last.heartbeat, last.heartbeat.phase_s, silent=False)
        if last.heartbeat.phase_s > allowed_s
        else None
    )


def has_shrunk(heard: Sequence[Heard], *, num_workers: int) -> bool:
    """Whether a whole group is at work that was made with fewer ranks than `num_workers`.

    Only an elastic group is ever made smaller. While a rank of it has not been heard, or is before
    its first step, it is just starting.
    """
    is_whole = bool(heard) and len(heard) == heard[0].heartbeat.world_size
    return is_whole and len(heard) < num_workers and all(each.heartbeat.step > 0 for each in heard)
