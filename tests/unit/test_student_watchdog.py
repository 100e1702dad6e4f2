"""The watchdog blames the rank that holds the others up, and nobody while teachers or the store are
slow; a group that starts is let be."""

from dataclasses import replace

import pytest

from stillhouse.cluster.heartbeat import Heard, Heartbeat, Phase
from stillhouse.student.watchdog import has_shrunk, stalled

PATIENCE_S = 60.0


def heard(
    rank: int,
    step: int,
    phase: Phase,
    *,
    phase_s: float = 1.0,
    ago_s: float = 0.5,
    world_size: int = 4,
) -> Heard:
    return Heard(
        Heartbeat("student", rank, world_size, "node", 100 + rank, step, phase, phase_s), ago_s
    )


def test_nothing_is_stalled_before_anybody_was_heard() -> None:
    assert stalled([], patience_s=PATIENCE_S) is None


def test_ranks_that_move_are_not_stalled() -> None:
    assert (
        stalled([heard(0, 7, "step"), heard(1, 7, "step", phase_s=59.0)], patience_s=PATIENCE_S)
        is None
    )


def test_a_silent_rank_is_to_blame_though_the_others_stand_still_for_longer() -> None:
    waiting = heard(0, 8, "step", phase_s=70.0)
    stopped = heard(1, 8, "step", phase_s=0.1, ago_s=69.0)
    found = stalled([waiting, stopped], patience_s=PATIENCE_S)
    assert found is not None
    assert (found.heartbeat.rank, found.seconds, found.silent) == (1, 69.0, True)


@pytest.mark.parametrize(("phase", "others"), [("step", "snapshot"), ("snapshot", "commit")])
def test_of_ranks_that_all_stand_still_the_one_that_got_least_far_is_to_blame(
    phase: Phase, others: Phase
) -> None:
    ranks = [
        heard(0, 7, others, phase_s=80.0),
        heard(1, 7, phase, phase_s=61.0),
        heard(2, 8, "data", phase_s=61.0),
    ]
    found = stalled(ranks, patience_s=PATIENCE_S)
    assert found is not None
    assert (found.heartbeat.rank, found.seconds, found.silent) == (1, 61.0, False)


@pytest.mark.parametrize(("phase", "step"), [("data", 7), ("data", 8), ("step", 7)])
def test_a_read_that_does_not_return_is_to_blame_though_the_others_wait_for_chunks(
    phase: Phase, step: int
) -> None:
    """A rank that has its chunks waits in the same phase for the one that has not."""
    reading = heard(1, 7, "reading", phase_s=61.0)
    found = stalled([heard(0, step, phase, phase_s=500.0), reading], patience_s=PATIENCE_S)
    assert found is not None
    assert (found.heartbeat.rank, found.heartbeat.phase, found.seconds, found.silent) == (
        1,
        "reading",
        61.0,
        False,
    )


def test_a_read_that_takes_less_than_the_watchdog_allows_is_no_stall() -> None:
    assert (
        stalled(
            [heard(0, 8, "data", phase_s=500.0), heard(1, 7, "reading", phase_s=59.0)],
            patience_s=PATIENCE_S,
        )
        is None
    )


@pytest.mark.parametrize("phase", ["data", "commit"])
def test_waiting_for_chunks_or_for_the_store_is_no_stall_however_long(phase: Phase) -> None:
    patient = heard(1, 7, phase, phase_s=1e5)
    assert stalled([heard(0, 8, "step", phase_s=1e5), patient], patience_s=PATIENCE_S) is None
    assert (
        stalled([heard(0, 8, "step"), replace(patient, ago_s=61.0)], patience_s=PATIENCE_S)
        is not None
    )


def test_a_start_may_take_longer_than_a_step() -> None:
    assert stalled([heard(0, 0, "start", phase_s=599.0)], patience_s=PATIENCE_S) is None
    assert stalled([heard(0, 0, "start", phase_s=601.0)], patience_s=PATIENCE_S) is not None


@pytest.mark.parametrize("num_heard", [0, 1, 3])
def test_a_group_of_which_not_every_rank_was_heard_has_not_shrunk(num_heard: int) -> None:
    assert not has_shrunk([heard(rank, 1, "step") for rank in range(num_heard)], num_workers=4)


def test_a_group_that_is_as_large_as_asked_for_has_not_shrunk() -> None:
    assert not has_shrunk([heard(rank, 1, "step") for rank in range(4)], num_workers=4)


@pytest.mark.parametrize("phase", ["commit", "start"])
def test_a_group_that_was_made_smaller_has_shrunk_once_none_of_its_ranks_restores_or_loads(
    phase: Phase,
) -> None:
    ranks = [heard(rank, 7, "step", world_size=2) for rank in (0, 1)]
    assert has_shrunk(ranks, num_workers=4)
    assert not has_shrunk([ranks[0], heard(1, 0, phase, world_size=2)], num_workers=4)
