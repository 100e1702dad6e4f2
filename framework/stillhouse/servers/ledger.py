"""A ledger of money for a server's answers, in the store.

<folder>/purchases/grants/0000000007.json        money that one process may spend

It is written by create-only puts alone, so all processes on all machines share it, and any of them
may be killed. Grants are a log: number n is written by a process that has read those before it, and
fails where another has written n meanwhile. So their sum never exceeds the limit. Money is spent
out of grants in memory; what a lost process had left of its own counts as spent.
"""

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from stillhouse.errors import ServerError, StoreError
from stillhouse.retry import DEFAULT_PATIENCE, insist
from stillhouse.sealed import opened, sealed
from stillhouse.store.object_store import Blobs
from stillhouse.store.recipe import canonical_json

_log = logging.getLogger(__name__)

_NANO = 1_000_000_000  # nanodollars to the dollar: a token of the cheapest server costs some
_NUM_GRANTS = 1000  # into which a limit is cut, where requests are small
_VERSION = 1


class Ledger:
    """Money for the requests of one process. Safe to share among threads.

    `folder`: in `blobs`, of what is bought. `limit_usd`: of all processes that ever bought for it,
    together, as the setting says; None: nothing is limited, and no grant is written. The first
    grant is of one request, such as a probe; each later one is of many, and what is left of it is
    lost with the process.
    """

    def __init__(
        self,
        blobs: Blobs,
        folder: str,
        *,
        limit_usd: float | None,
        setting: str,
        num_grants: int = _NUM_GRANTS,
    ) -> None:
        self._blobs, self._prefix = blobs, f"{folder}/purchases/grants"
        self._limit = None if limit_usd is None else math.floor(limit_usd * _NANO)
        self._setting, self._num_grants = setting, num_grants
        self._lock = threading.Lock()
        self._share = 0  # of the limit, of which the next grant is at least
        self._left = 0  # of the own grants
        self._granted = 0  # by all grants that were read or written
        self._next = 0  # the number of the first grant that was not

    def reserve(self, price: int) -> None:
        """Set `price` nanodollars aside, before a request that may cost so much.

        Raises ServerError where the limit has no room for it, and then nothing is set aside.
        """
        if self._limit is None:
            return
        with self._lock:
            while self._left < price:
                self._left += self._claim(price - self._left, self._limit)
            self._left -= price

    def give_back(self, price: int) -> None:
        """Take back what a request did not cost."""
        with self._lock:
            self._left += price

    def granted_usd(self) -> float:
        """What all grants in the store hold: never less than what was spent."""
        with self._lock:
            self._read_on()
            return self._granted / _NANO

    def _claim(self, least: int, limit: int) -> int:
        """The money of a new grant, or 0 where another process was faster."""
        self._read_on()
        room = limit - self._granted
        if least > room:
            raise ServerError(
                f"the next request needs {least / _NANO:.6g} USD more, but of "
                f"{self._setting}, which is {limit / _NANO:.6g}, "
                f"{self._granted / _NANO:.6g} are spent or reserved, as "
                f"{self._blobs.url}/{self._prefix} says. All that was bought is kept: raise "
                "max_cost_usd, and run again to go on from here"
            )
        amount = max(least, min(self._share, room))
        data = sealed_values({"nanodollars": amount})
        if not patiently(lambda: self._blobs.create(self._key(), data)):
            return 0
        self._granted += amount
        self._next += 1
        self._share = limit // self._num_grants
        _log.info("%.6g of %.6g USD are spent or reserved", self._granted / _NANO, limit / _NANO)
        return amount

    def _read_on(self) -> None:
        """Read the grants that were written since, by whomever."""
        while True:
            try:
                data = bytes(patiently(lambda: self._blobs.read(self._key())))
            except FileNotFoundError:
                return
            amount = opened_values(data).get("nanodollars")
            if type(amount) is not int or amount < 0:
                raise StoreError(
                    f"{self._blobs.url}/{self._key()} is damaged, so it is unknown how much money "
                    "is spent; wanted what docs/format.md says of it: write it anew with the "
                    f"amount that is known, or with all of {self._setting}"
                )
            self._granted += amount
            self._next += 1

    def _key(self) -> str:
        return f"{self._prefix}/{self._next:010d}.json"


def sealed_values(values: Mapping[str, Any]) -> bytes:
    """An object of a purchase: values with a version, sealed."""
    return canonical_json(sealed({**values, "version": _VERSION}, compact=True))


def opened_values(data: bytes) -> dict[str, Any]:
    """The values of a sealed object of this version; nothing where it is damaged, or another."""
    try:
        values = opened(json.loads(data), compact=True)
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    return values if values.get("version") == _VERSION else {}


def patiently(call: Callable[[], Any]) -> Any:
    """What `call` returns, which is repeated while the store is unavailable."""

    def tell(seconds: float, why: str) -> None:
        _log.warning("the store has not taken a purchase for %.0f s: %s", seconds, why)

    return insist(call, patience=DEFAULT_PATIENCE, tell=tell)
