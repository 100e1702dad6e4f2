"""The rollouts that a data set's name stands for, `rollouts://<url>/<fingerprint16>`; without the
libraries that read other data sets."""

from stillhouse.config.corpus import ROLLOUTS
from stillhouse.store.rollout_store import RolloutStore, open_rollouts


def rollouts_named(dataset: str) -> RolloutStore:
    """The rollouts of a data set's name with its store, as `CorpusSection.in_store` gives it.
    Raises RecipeError where there are none."""
    url, _, fingerprint16 = dataset.removeprefix(ROLLOUTS).rpartition("/")
    assert url, "planning names the store"
    return open_rollouts(url, fingerprint16)
