"""Teachers and their machines are lost at every moment, and the chunks are those of a run to which
nothing happened."""

import pytest

from helpers.disasters import TEACHERS, Disaster
from helpers.scene import Undisturbed, contents, times_written
from stillhouse.tracking import PoolEvent

# of which most goes to starting processes, on a machine that others may use
pytestmark = pytest.mark.timeout(1200)

LEASES = 2  # that a teacher has at most


def test_every_chunk_is_published_once_and_is_the_undisturbed_runs(
    disaster: Disaster, undisturbed: Undisturbed
) -> None:
    keys = {f"casks/{disaster.store.key(number)}": number for number in disaster.plan.chunks}
    assert {
        key: times for key, times in times_written(disaster.bucket).items() if "/chunks/" in key
    } == dict.fromkeys(keys, 1)
    for key, number in keys.items():
        assert contents(disaster.bucket, key) == undisturbed.chunk(number)


def test_a_teachers_death_costs_its_leased_chunks_at_most(disaster: Disaster) -> None:
    num_made = sum(len(disaster.published(name)) for name in TEACHERS) + disaster.num_unpublished
    num_hedged = max(event.hedged for event in disaster.events if isinstance(event, PoolEvent))
    assert 0 < num_made - len(disaster.plan.chunks) <= LEASES * disaster.num_deaths + num_hedged


def test_a_machine_that_joins_is_used(disaster: Disaster) -> None:
    assert disaster.published_by_the_joined


def test_two_teachers_that_cannot_see_each_other_publish_a_chunk_once(disaster: Disaster) -> None:
    assert all(disaster.orphan in disaster.published(name) for name in TEACHERS)
    assert times_written(disaster.bucket)[f"casks/{disaster.store.key(disaster.orphan)}"] == 1
