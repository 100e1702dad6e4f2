"""The teacher pool: the generic pool, with a teacher's numbers from the config and the comparison of replicas by their probes."""

from collections.abc import Callable, Sequence
from time import monotonic, time

import numpy as np
from numpy.typing import NDArray

from stillhouse.config import TeacherSection
from stillhouse.engines.probe import require_planned_weights, require_same_teacher
from stillhouse.pool.dispatcher import Dispatcher, Limits
from stillhouse.pool.events import Crew
from stillhouse.pool.poison import Budget
from stillhouse.pool.retention import Retention
from stillhouse.sequence import WorkItem
from stillhouse.store import ChunkStore
from stillhouse.teacher.actor import Ready
from stillhouse.tracking import Tracker


def teacher_pool(
    crew: Crew[WorkItem, Ready],
    section: TeacherSection,
    *,
    store: ChunkStore,
    order: Sequence[int] | NDArray[np.int64],
    item_of: Callable[[int], WorkItem],
    window_chunks: int,
    journal: Tracker,
    retention: Retention | None = None,
    clock: Callable[[], float] = monotonic,
    wall: Callable[[], float] = time,
) -> Dispatcher[WorkItem, Ready]:
    """A pool that makes the chunks of `order` with `min_replicas` to `max_replicas` teachers.

    A replica must have the weights that the recipe was planned with, and answer the probe as the first one did.
    """

    def require_same(first: Ready, other: Ready, replica: int) -> None:
        require_planned_weights(other.weights_digest, store.recipe, replica=replica)
        require_same_teacher(first.probe, other.probe, replica=replica)

    return Dispatcher(
        crew,
        Limits(
            min_workers=section.min_replicas,
            max_workers=section.max_replicas,
            watchdog_s=section.watchdog_s,
            budget=Budget(section.max_failures, section.max_set_aside, section.lease_timeout_s),
        ),
        compare=require_same,
        store=store,
        order=order,
        item_of=item_of,
        window_chunks=window_chunks,
        journal=journal,
        retention=retention,
        clock=clock,
        wall=wall,
    )
