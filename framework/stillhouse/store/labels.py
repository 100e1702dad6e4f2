"""Labels: which run filled a recipe's store, when, and from what, for people. They are outside the
fingerprint, and nothing depends on one.

<root>/<first 16 digits of the fingerprint>/labels/<run>.json      created once a run, never changed
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from stillhouse.errors import StoreError
from stillhouse.store.chunk_store import ChunkStore
from stillhouse.store.names import is_name
from stillhouse.store.recipe import canonical_json

LABEL_VERSION = 1

_MOST_BYTES = 64 << 10
_MOMENT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a run says of the chunks that it made or read."""

    run: str  # a name: see names.py
    created: str  # when the run began, in UTC: 2026-11-29T08:00:00Z
    names: Mapping[str, str]  # of models, data and software, without secrets


class Labels(NamedTuple):
    """What was found under labels/."""

    labels: list[Label]  # by the time of the runs, the newest last
    broken: list[str]  # keys of what is no label, or cannot be read, the newest first
    num_older: int  # objects that were not looked at


def moment(seconds: float) -> str:
    """A time in seconds since 1970 as labels have it."""
    return datetime.fromtimestamp(seconds, UTC).strftime(_MOMENT)


def put_label(store: ChunkStore, label: Label) -> bool:
    """Create a label. False if the run has one already, which stays. Raises StoreError where the
    store cannot be written."""
    assert is_name(label.run), f"{label.run!r} is no name"
    return store.blobs.create(_key(store, label.run), _packed(label))


def labels_of(store: ChunkStore, *, most: int | None = None) -> Labels:
    """The labels of a recipe, or the `most` that were put last. A broken one is no error; a store
    that cannot be listed is."""
    blobs = sorted(
        store.blobs.under(f"{store.folder}/labels"), key=lambda blob: (blob.modified, blob.key)
    )
    labels, broken = list[Label](), list[str]()
    while blobs and len(labels) != most:
        key = blobs.pop().key
        with suppress(FileNotFoundError):  # a person has deleted it since the listing
            label = _read(store, key)
            if label is None:
                broken.append(key)
            else:
                labels.append(label)
    labels.sort(key=lambda label: (label.created, label.run))
    return Labels(labels, broken, num_older=len(blobs))


def _read(store: ChunkStore, key: str) -> Label | None:
    """None where it is broken, or cannot be read. Raises FileNotFoundError where nothing is
    there."""
    try:
        data, num_bytes = store.blobs.read_start(key, _MOST_BYTES)
    except StoreError:
        return None
    label = _parsed(bytes(data)) if num_bytes <= _MOST_BYTES else None
    return label if label is not None and key == _key(store, label.run) else None


def _key(store: ChunkStore, run: str) -> str:
    return f"{store.folder}/labels/{run}.json"


def _packed(label: Label) -> bytes:
    return canonical_json({**asdict(label), "version": LABEL_VERSION})


def _parsed(data: bytes) -> Label | None:
    """None where the bytes are not those that `_packed` makes of a label of this version."""
    try:
        values = json.loads(data)
        label = Label(**{name: values[name] for name in ("run", "created", "names")})
        is_label = is_name(label.run) and _is_moment(label.created) and _are_texts(label.names)
        return label if is_label and _packed(label) == data else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_moment(text: Any) -> bool:
    return isinstance(text, str) and datetime.fromisoformat(text).strftime(_MOMENT) == text


def _are_texts(names: Any) -> bool:
    return isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
