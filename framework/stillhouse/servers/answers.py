"""Answers that were paid for, in the store until what is made of them is published.

<folder>/purchases/answers/0000000012/<digest>.json    what a server said to a question of a block

They are written by create-only puts, so no process buys what another has bought and kept.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from stillhouse.errors import StoreError
from stillhouse.servers.ledger import opened_values, patiently, sealed_values
from stillhouse.store.numbered import NumberedStore
from stillhouse.store.object_store import Blobs

_log = logging.getLogger(__name__)


def answers_of(store: NumberedStore[Any]) -> "Answers":
    """Those of what a store's objects are made of."""
    return Answers(store.blobs, store.folder, is_published=store.has_whole)


class Answers:
    """Answers to the questions of blocks. Safe to share among threads.

    `folder`: in `blobs`, of what is bought. `is_published`: whether a block is, by its number.
    """

    def __init__(self, blobs: Blobs, folder: str, *, is_published: Callable[[int], bool]) -> None:
        self._blobs, self._is_published = blobs, is_published
        self._prefix = f"{folder}/purchases/answers"

    def read(self, block: int, digest: str) -> dict[str, Any]:
        """What was kept of a question; nothing where that is not there, or is damaged."""
        try:
            key = self._key(block, digest)
            return opened_values(bytes(patiently(lambda: self._blobs.read(key))))
        except FileNotFoundError:
            return {}

    def keep(self, block: int, digest: str, values: Mapping[str, Any]) -> None:
        """Keep an answer. One that is there already stays."""
        data, key = sealed_values(values), self._key(block, digest)
        patiently(lambda: self._blobs.create(key, data))

    def tidy(self) -> None:
        """Delete the answers of blocks that are published, if the store lets it: those are their
        record now."""
        try:
            self._forget_published()
        except StoreError as error:
            _log.info("answers that are not needed any more stay in the store: %s", error)

    def _forget_published(self) -> None:
        kept = [blob.key for blob in self._blobs.under(self._prefix)]
        for digits in sorted({key[len(self._prefix) + 1 :].partition("/")[0] for key in kept}):
            if digits.isdecimal() and self._is_published(int(digits)):
                self._blobs.delete_under(f"{self._prefix}/{digits}")

    def _key(self, block: int, digest: str) -> str:
        return f"{self._prefix}/{block:010d}/{digest}.json"
