"""Progress of a pool: its events in the journal, every two seconds and at the end."""

from dataclasses import asdict

from stillhouse.pool.leases import LeaseTable
from stillhouse.tracking import PoolEvent, Tracker

_ROW_EVERY_S = 2.0


class Progress:
    """Counts what the lease table does not: published tokens, and the time in which only the window
    kept workers idle."""

    def __init__(self, table: LeaseTable, *, window_chunks: int, journal: Tracker, now: float):
        self._table = table
        self._window_chunks = window_chunks
        self._journal = journal
        self._last_row = self._last_look = now
        self._num_tokens, self._window_wait_s = 0, 0.0

    def add(self, num_tokens: int) -> None:
        """Count target tokens that were published."""
        self._num_tokens += num_tokens

    def look(self, now: float, *, limit: int, num_ready: int) -> None:
        """Note whether workers wait only because the window ends at `limit`; journal an event if
        one is due."""
        if self._table.held_back(limit=limit) and not self._table.num_leased:
            self._window_wait_s += now - self._last_look
        self._last_look = now
        if now - self._last_row >= _ROW_EVERY_S and not self._table.done:
            self.record(now, num_ready=num_ready)

    def record(self, now: float, *, num_ready: int) -> None:
        """Journal an event now."""
        table, seconds = self._table, now - self._last_row
        self._journal.record(
            PoolEvent(
                published=table.num_settled,
                needed=table.num_wanted,
                in_flight=table.num_leased,
                window_chunks=min(self._window_chunks, table.num_wanted),
                tokens_per_s=self._num_tokens / max(seconds, 1e-9),
                window_wait_s=self._window_wait_s,
                replicas=num_ready,
                **asdict(table.tally),
            )
        )
        self._last_row, self._num_tokens = now, 0
