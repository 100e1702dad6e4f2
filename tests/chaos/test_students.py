"""A student's ranks die and hang, and at last every machine is lost, its driver's too: each time it
goes on from its last commit."""

import numpy as np
import pytest

from helpers.disasters import WATCHDOG_S, Disaster, last_commit_of, steps_of
from helpers.scene import Undisturbed, curve
from stillhouse.store.consumers import registered
from stillhouse.tracking import RecoveryEvent, StallEvent, latest_train_events

# of which most goes to starting processes, on a machine that others may use
pytestmark = pytest.mark.timeout(1200)


def test_every_sequence_of_the_epoch_is_trained_once_and_the_losses_are_the_undisturbed_runs(
    disaster: Disaster, undisturbed: Undisturbed
) -> None:
    """A step that came after the last commit is taken again, to the same bits; what stands is its
    last time."""
    rows, order = [*disaster.events, *disaster.events_elsewhere], disaster.plan.order
    read = np.concatenate(
        [order.sequences(row.step - 1) for row in latest_train_events(rows, "student")]
    )
    assert sorted(read.tolist()) == list(range(order.num_sequences))
    assert curve(rows) == undisturbed.curve


def test_a_lost_rank_costs_the_steps_since_the_last_commit(disaster: Disaster) -> None:
    lost = next(row for row in disaster.events if isinstance(row, RecoveryEvent))
    assert (lost.cause, lost.world_size) == ("died", 2)
    before = disaster.events[: disaster.events.index(lost)]
    *_, last_before, first_after = steps_of(before)
    assert last_commit_of(before) <= lost.resumed_step == first_after - 1
    assert lost.lost_steps == last_before - lost.resumed_step


def test_a_rank_that_hangs_is_found_and_replaced(disaster: Disaster) -> None:
    (*_, stall) = [row for row in disaster.events if isinstance(row, StallEvent)]
    assert stall.seconds >= WATCHDOG_S
    assert disaster.stopped is not None
    assert not disaster.stopped.is_running()


def test_when_everything_is_lost_the_run_goes_on_from_the_bucket(disaster: Disaster) -> None:
    elsewhere = steps_of(disaster.events_elsewhere)
    assert last_commit_of(disaster.events) < elsewhere[0] <= steps_of(disaster.events)[-1] + 1
    assert elsewhere[-1] == disaster.plan.total_steps
    (reader,) = registered(
        disaster.store
    ).consumers  # the store takes both for one: nothing is kept for the one that is gone
    assert reader.committed_step == disaster.plan.total_steps
