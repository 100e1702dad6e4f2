"""Who reads a store, and how far they are: one small object for each reader, in the store itself,
so that any pool on any cluster sees it.

<root>/<first 16 digits of the fingerprint>/readers/<name>.json      replaced by its reader alone,
with each checkpoint

A chunk that every registered reader has committed past may be deleted. So what cannot be understood
here has to be kept from being guessed.
"""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath
from typing import NamedTuple

from stillhouse.errors import StoreError
from stillhouse.sealed import opened, sealed
from stillhouse.store.chunk_store import ChunkStore
from stillhouse.store.explain import StoreForbidden
from stillhouse.store.recipe import canonical_json

READER_VERSION = 1

_MOST_NUMBER = 2**53  # up to which every reader of JSON has the same number
_LEAST = {"global_batch_sequences": 1, "window_chunks": 1, "total_steps": 0, "committed_step": 0}
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """One student's way through the sequences of a recipe, and how much of it is behind it for
    good."""

    name: str
    global_batch_sequences: int
    seed: int
    window_chunks: int  # neighbouring chunks whose sequences are mixed
    total_steps: int
    # steps that are safe in a checkpoint: it will not go back behind them, unless that checkpoint
    # is lost
    committed_step: int


class Registered(NamedTuple):
    readers: list[Consumer]  # by name
    # what this version does not understand, as keys: nobody knows which chunks they still need
    strangers: list[str]


def consumer_name(place: str, role: str) -> str:
    """A name that a run keeps when it goes on from its checkpoints in `place`, and that one with
    another place does not have."""
    run = re.sub(r"[^A-Za-z0-9._-]", "-", PurePath(place).name)[:64] or "run"
    return f"{run}-{hashlib.sha256(place.encode()).hexdigest()[:8]}-{role}"


def join(store: ChunkStore, reader: Consumer) -> None:
    """Register a reader that is about to begin; where it is known already, because its run goes on,
    it keeps what it has committed.

    Raises StoreForbidden where the store may only be read: then nobody who deletes chunks knows of
    this reader.
    """
    key = _key(store, reader.name)
    if not store.blobs.create(key, _packed(reader)):
        before = _parsed(bytes(store.blobs.read(key)))
        if before is not None and before != reader:
            commit(store, replace(reader, committed_step=before.committed_step))


def leave(store: ChunkStore, name: str) -> None:
    """Take back a reader that will never read; it need not be there. Where the store may only be
    read, it stays."""
    with suppress(StoreForbidden):
        store.blobs.delete(_key(store, name))


def commit(store: ChunkStore, reader: Consumer) -> None:
    """Tell that a reader has committed `reader.committed_step`, which may be lower than before
    where a checkpoint was lost.

    Raises StoreUnavailable where the store does not answer: then chunks are kept for longer, and
    the next commit tells it. Raises StoreForbidden where the store may only be read.
    """
    store.blobs.replace(_key(store, reader.name), _packed(reader))


def registered(store: ChunkStore) -> Registered:
    """Everyone who reads the store's chunks."""
    found = Registered([], [])
    for blob in store.blobs.under(f"{store.folder}/readers"):
        try:
            reader = _parsed(bytes(store.blobs.read(blob.key)))
        except FileNotFoundError:
            continue  # somebody has just taken it away
        if reader is not None and blob.key == f"{store.folder}/readers/{reader.name}.json":
            found.readers.append(reader)
        else:
            found.strangers.append(blob.key)
    return found


def _key(store: ChunkStore, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"a reader cannot be called {name!r}; wanted up to 128 letters, digits, dots, hyphens "
            "and underscores"
        )
    return f"{store.folder}/readers/{name}.json"


def _packed(reader: Consumer) -> bytes:
    values = {**asdict(reader), "version": READER_VERSION}
    return canonical_json(sealed(values, compact=True))


def _parsed(data: bytes) -> Consumer | None:
    names = [field.name for field in fields(Consumer)]
    try:
        # a flipped bit in a number of steps would have chunks deleted too early
        values = opened(json.loads(data), compact=True)
        whole = [
            type(values[name]) is (str if name == "name" else int) for name in (*names, "version")
        ]
        if not (
            values["version"] == READER_VERSION
            and all(whole)
            and set(values) == {*names, "version"}
        ):
            return None
        if _NAME.fullmatch(values["name"]) and all(
            least <= values[name] <= _MOST_NUMBER for name, least in _LEAST.items()
        ):
            return Consumer(**{name: values[name] for name in names})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return None
