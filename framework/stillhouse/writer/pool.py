"""What the pool needs for writers: its limits from the config, and the comparison of replicas."""

from collections.abc import Callable

from stillhouse.config.generate import WriterSection
from stillhouse.errors import ChangedWeightsError, TeacherError
from stillhouse.pool.fleet import Limits
from stillhouse.pool.poison import Budget, Words
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.writer.actor import Ready

OF_WRITERS = Words("writer", "shard", "prompt", "writer.batch_sequences")


def limits_of(section: WriterSection) -> Limits:
    budget = Budget(
        section.max_failures, section.max_set_aside, section.lease_timeout_s, OF_WRITERS
    )
    return Limits(section.min_replicas, section.max_replicas, section.watchdog_s, budget)


def comparison(recipe: RolloutRecipe) -> Callable[[Ready, Ready, int], None]:
    """A function of (first, other, other's number) that raises unless `other` has the planned
    weights, and the same ones as `first`."""

    def require_same(first: Ready, other: Ready, replica: int) -> None:
        found, wanted = other.weights_digest, recipe.writer_digest
        if found is not None and found != wanted:
            raise ChangedWeightsError(
                f"writer {replica} loaded other weights than were planned: found {found[:16]}, "
                f"wanted {wanted[:16]}; it has published nothing. Give the same command again if "
                "the files changed, or give every machine the same files"
            )
        if first.weight_hashes != other.weight_hashes:
            raise TeacherError(
                f"writer {replica} has other weights than the first; wanted the same files "
                "everywhere: look for a stale copy of the model on its machine, or name a revision"
            )

    return require_same
