"""Processes that buy scores of a server, and are killed while they do."""

import os
import signal
from collections.abc import Callable
from typing import NamedTuple

from helpers.chunks import make_chunk, small_recipe
from stillhouse.config import ScoringSection
from stillhouse.engines.openai import TABLE
from stillhouse.engines.openai_desk import Desk
from stillhouse.engines.openai_scores import Document, documents_of
from stillhouse.retry import Patience
from stillhouse.sequence import WorkItem
from stillhouse.servers.answers import answers_of
from stillhouse.servers.client import Access, Server
from stillhouse.servers.ledger import Ledger
from stillhouse.store import ChunkStore
from stillhouse.store.object_store import Blobs

RECIPE = small_recipe(format=2, teacher_kind="api", num_sequences=8, sequence_length=16)
ONE_USD_A_TOKEN = 1e6  # usd_per_million_tokens
BRIEF = Patience(end_after_s=10.0, first_pause_s=0.01, last_pause_s=0.02)


class Moment(NamedTuple):
    """A put at which a process ends."""

    place: str  # grants or answers
    number: int  # of the puts there, from 1
    is_done: bool  # whether the object is there already


class MortalBlobs(Blobs):
    """A store whose user ends at a moment: `end` does not return."""

    def __init__(self, url: str, moment: Moment, end: Callable[[], None]) -> None:
        super().__init__(url)
        self.moment, self.end, self.num_puts = moment, end, 0

    def create(self, key: str, data: bytes) -> bool:
        if f"/{self.moment.place}/" not in key:
            return super().create(key, data)
        self.num_puts += 1
        if self.num_puts == self.moment.number and not self.moment.is_done:
            self.end()
        created = super().create(key, data)
        if self.num_puts == self.moment.number:
            self.end()
        return created


def documents(*chunks: int) -> list[Document]:
    """All of these chunks."""
    items = (WorkItem(number, make_chunk(RECIPE, number).sequences) for number in chunks)
    return [document for item in items for document in documents_of(item)]


def price_of(document: Document) -> int:
    """Dollars."""
    return len(document.token_ids_D) + 1


def desk_of(
    blobs: Blobs,
    base_url: str,
    *,
    limit_usd: float | None,
    num_grants: int = 1000,
    timeout_s: float = 60.0,
) -> Desk:
    """A desk of one process, at the price of a dollar a token."""
    store = ChunkStore(blobs, RECIPE)
    section = ScoringSection(
        base_url=base_url,
        served_model="toy",
        usd_per_million_tokens=ONE_USD_A_TOKEN,
        timeout_s=timeout_s,
    )
    ledger = Ledger(
        blobs, store.folder, limit_usd=limit_usd, setting="limit_usd", num_grants=num_grants
    )
    return Desk(
        Server(section, table=TABLE, access=Access(None, ledger), patience=BRIEF),
        answers_of(store),
        RECIPE.k,
        RECIPE.vocab_size,
    )


def buy_until_killed(url: str, base_url: str, limit_usd: float, moment: Moment | None) -> None:
    """In a process of its own: buy all documents of chunk 0, and die at the moment."""
    blobs = Blobs(url) if moment is None else MortalBlobs(url, moment, _die)
    desk_of(blobs, base_url, limit_usd=limit_usd).scores_of_all(documents(0), num_threads=1)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
