"""The cache of keys and values of a model that writes one token after the other."""

import inspect
from typing import NamedTuple

from transformers import DynamicCache, PreTrainedModel


class NamedCache(NamedTuple):
    """An empty cache, and the name of the argument by which the model takes it: another one in
    newer versions of transformers."""

    name: str
    cache: DynamicCache


def new_cache(model: PreTrainedModel) -> NamedCache:
    """A cache for one batch of sequences."""
    takes = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"
    return NamedCache(name, DynamicCache(config=model.config))
