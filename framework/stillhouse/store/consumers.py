"""The consumers of a store, and their progress: one small object for each, in the store itself, so
that any pool on any cluster sees it.

<root>/<first 16 digits of the fingerprint>/readers/<name>.json      replaced by its consumer alone,
with each checkpoint

Retention: a chunk that every consumer has committed past may be deleted. So an object that cannot
be understood is reported, never guessed at.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath
from typing import NamedTuple

from stillhouse.errors import StoreError
from stillhouse.sealed import opened, sealed
from stillhouse.store.chunk_store import ChunkStore
from stillhouse.store.explain import StoreForbidden
from stillhouse.store.names import is_name, name_like
from stillhouse.store.recipe import canonical_json

CONSUMER_VERSION = 1

_MOST_NUMBER = 2**53  # up to which every parser of JSON has the same number
_LEAST = {"global_batch_sequences": 1, "window_chunks": 1, "total_steps": 0, "committed_step": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A student's registration: the order in which it reads the sequences of a recipe, and its
    progress."""

    name: str
    global_batch_sequences: int
    seed: int
    window_chunks: int  # neighbouring chunks whose sequences are mixed
    total_steps: int
    # steps that are safe in a checkpoint: training resumes from an earlier one only where that
    # checkpoint is lost
    committed_step: int


class Registered(NamedTuple):
    """What is registered in a store."""

    consumers: list[Consumer]  # by name
    # keys of what this version does not understand: which chunks those need is unknown
    unknown: list[str]


def consumer_name(place: str, role: str) -> str:
    """A consumer's name: the same whenever a run resumes from its checkpoints in `place`, and
    another one for another place."""
    digits = hashlib.sha256(place.encode()).hexdigest()[:8]
    return f"{name_like(PurePath(place).name)}-{digits}-{role}"


def join(store: ChunkStore, consumer: Consumer) -> None:
    """Register a consumer before it begins; one that is known already, because its run resumes,
    keeps its `committed_step`.

    Raises StoreForbidden where the store is read-only: then retention does not know of this
    consumer.
    """
    key = _key(store, consumer.name)
    if not store.blobs.create(key, _packed(consumer)):
        before = _parsed(bytes(store.blobs.read(key)))
        if before is not None and before != consumer:
            commit(store, replace(consumer, committed_step=before.committed_step))


def leave(store: ChunkStore, name: str) -> None:
    """Remove the registration of a consumer that will not read any more; it need not be there. In a
    read-only store it stays."""
    with suppress(StoreForbidden):
        store.blobs.delete(_key(store, name))


def commit(store: ChunkStore, consumer: Consumer) -> None:
    """Record that a consumer has committed `committed_step`, which may be lower than before where a
    checkpoint was lost.

    Raises StoreUnavailable where the store does not answer: then chunks are kept for longer, until
    the next commit. Raises StoreForbidden where the store is read-only.
    """
    store.blobs.replace(_key(store, consumer.name), _packed(consumer))


def registered(store: ChunkStore) -> Registered:
    """Every consumer of the store's chunks."""
    found = Registered([], [])
    for blob in store.blobs.under(f"{store.folder}/readers"):
        try:
            consumer = _parsed(bytes(store.blobs.read(blob.key)))
        except FileNotFoundError:
            continue  # it has left since the listing
        if consumer is not None and blob.key == _key(store, consumer.name):
            found.consumers.append(consumer)
        else:
            found.unknown.append(blob.key)
    return found


def _key(store: ChunkStore, name: str) -> str:
    if not is_name(name):
        raise StoreError(
            f"a consumer cannot be called {name!r}; wanted up to 128 letters, digits, dots, "
            "hyphens and underscores"
        )
    return f"{store.folder}/readers/{name}.json"


def _packed(consumer: Consumer) -> bytes:
    values = {**asdict(consumer), "version": CONSUMER_VERSION}
    return canonical_json(sealed(values, compact=True))


def _parsed(data: bytes) -> Consumer | None:
    """None where this version does not understand it. The checksum is verified because a flipped
    bit in a number of steps would have chunks deleted too early."""
    wanted = {field.name: field.type for field in fields(Consumer)}
    try:
        values = opened(json.loads(data), compact=True)
        if type(version := values.pop("version")) is not int or version != CONSUMER_VERSION:
            return None
        types = {name: type(value) for name, value in values.items()}
        in_range = all(least <= values[name] <= _MOST_NUMBER for name, least in _LEAST.items())
        if types == wanted and in_range and is_name(values["name"]):
            return Consumer(**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return None
