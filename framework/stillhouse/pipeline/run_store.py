"""The store of a run: it is opened to be filled or to be read, the run's students are registered as
its consumers, and teachers learn what consumers need."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import StoreError
from stillhouse.pipeline.console import say
from stillhouse.pool.retention import Retention
from stillhouse.store import ChunkStore, Consumer, StoreForbidden
from stillhouse.store.consumers import consumer_name, join, leave
from stillhouse.student.job import TrainJob, order_of, resume_location
from stillhouse.student.loader import chunks_read_ahead
from stillhouse.student.order import Order


def store_to_fill(store: ChunkStore, chunks: Collection[int]) -> ChunkStore:
    """The store, for a command that makes these chunks. Raises StoreError where other processes
    cannot see it, or it may only be read."""
    require_shareable(store.url)
    try:
        return ChunkStore.create(store.url, store.recipe)
    except StoreForbidden as error:
        num_missing = len(set(chunks) - store.published())
        if num_missing:
            cure = (
                f"{num_missing} of {len(chunks)} chunks are missing there; give write access, "
                "or store.url another place"
            )
        else:
            cure = (
                f"all {len(chunks)} chunks that training reads are there: `stillhouse train` "
                "reads them, and need not write"
            )
        raise StoreError(
            f"{store.url} cannot be written, which this command has to do: {cure} ({error})"
        ) from None


def store_to_read(store: ChunkStore, chunks: Collection[int]) -> ChunkStore:
    """The store, for a command that makes no chunk. It is written only where recipe.json is
    missing. Raises StoreError where chunks are missing."""
    require_chunks(store, chunks)
    return store if store.has_recipe() else ChunkStore.create(store.url, store.recipe)


def require_chunks(store: ChunkStore, chunks: Collection[int]) -> None:
    """Raise StoreError where chunks are missing, of those that training reads."""
    num_missing = len(set(chunks) - store.published())
    if num_missing:
        raise StoreError(
            f"{num_missing} of {len(chunks)} chunks are not in {store.url}; "
            "`stillhouse produce` makes them, `stillhouse run` makes them and trains at the same "
            "time"
        )


def require_shareable(url: str) -> None:
    """Raise StoreError where only one process would see the store."""
    if url.startswith("memory:"):
        raise StoreError(
            "a memory:// store cannot be shared between processes; give store.url a directory or "
            "a bucket"
        )


def register(store: ChunkStore, jobs: Sequence[TrainJob]) -> list[str]:
    """Register a run's students as consumers, and take back roles that the run has no more. Returns
    their names. Chunks that are there can be relied on from now on."""
    own = [job.consumer(0) for job in jobs]
    for consumer in own:
        join(store, consumer)
    # of an earlier attempt with another config: the store would keep every chunk for it
    place = resume_location(jobs[0].section, jobs[0].run_dir)
    for role in {"student", "control"} - {job.role for job in jobs}:
        leave(store, consumer_name(place, role))
    return [consumer.name for consumer in own]


def register_if_allowed(store: ChunkStore, jobs: Sequence[TrainJob]) -> None:
    """Register a run's students where the store can be written, and warn where it cannot: then
    another run may delete their chunks."""
    try:
        register(store, jobs)
    except StoreForbidden:
        say(
            f"{store.url} may only be read, so this training cannot be registered there: a run "
            'elsewhere with store.retain = "until-read" may delete chunks that are still to be '
            "read here, which would end this command; what is committed stays"
        )


def retention_of(
    store: ChunkStore, order: Order, *, own: Collection[str], deletes: bool
) -> Retention:
    """The consumers of the store, the run's students (`own`, by name) among them, as they limit
    teachers that work in this order. `deletes`: a chunk that all are done with is deleted."""

    def position(consumer: Consumer) -> int | None:
        if (consumer.seed, consumer.window_chunks) != (order.seed, order.window_chunks):
            return None
        return order_of(consumer, store.recipe).chunks_finished(consumer.committed_step)

    def done_after(consumer: Consumer) -> NDArray[np.int64]:
        return order_of(consumer, store.recipe).steps_until_done_with(consumer.total_steps)

    return Retention(
        store,
        own=own,
        deletes=deletes,
        least_ahead=chunks_read_ahead(order),
        done_after=done_after,
        position=position,
    )
