"""The model that a server's first answer was of, in the store: all processes hold the server to it.

<folder>/purchases/served.json       created once
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from stillhouse.servers.ledger import opened_values, patiently, sealed_values
from stillhouse.store.object_store import Blobs


@dataclass(frozen=True, slots=True)
class Served:
    """What an answer says of the model that gave it."""

    model: str
    system_fingerprint: str | None  # None where a server has none

    @classmethod
    def by(cls, body: Any) -> "Served":
        values = body if isinstance(body, dict) else {}
        fingerprint = values.get("system_fingerprint")
        return cls(str(values.get("model", "")), fingerprint and str(fingerprint))


def first_in_store(blobs: Blobs, folder: str) -> Callable[[Served], Served]:
    """A function that returns the first one that any process told it. `folder`: in `blobs`, of what
    is asked for."""
    key = f"{folder}/purchases/served.json"

    def first(found: Served) -> Served:
        if patiently(lambda: blobs.create(key, sealed_values(asdict(found)))):
            return found
        values = opened_values(bytes(patiently(lambda: blobs.read(key))))
        return Served.by(values) if values else found

    return first
