"""What the pool needs for teachers: its limits from the config, and the comparison of replicas."""

from collections.abc import Callable

from stillhouse.config import TeacherSection
from stillhouse.engines.probe import require_planned_weights, require_same_teacher
from stillhouse.pool.fleet import Limits
from stillhouse.pool.poison import Budget
from stillhouse.store import Recipe
from stillhouse.teacher.actor import Ready


def limits_of(section: TeacherSection) -> Limits:
    budget = Budget(section.max_failures, section.max_set_aside, section.lease_timeout_s)
    return Limits(section.min_replicas, section.max_replicas, section.watchdog_s, budget)


def comparison(recipe: Recipe) -> Callable[[Ready, Ready, int], None]:
    """A function of (first, other, other's number) that raises unless `other` has the planned
    weights and answers the probe as `first` does."""

    def require_same(first: Ready, other: Ready, replica: int) -> None:
        require_planned_weights(other.weights_digest, recipe, replica=replica)
        require_same_teacher(first.probe, other.probe, replica=replica)

    return require_same
