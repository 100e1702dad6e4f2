"""The store of a run: opened to be filled or to be read, its readers registered, and what may be
deleted of it."""

from collections.abc import Collection, Sequence

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
    """The store, for a command that makes no chunk; nothing is written where recipe.json is there.

    Raises StoreError where chunks are missing.
    """
    require_chunks(store, chunks)
    return store if store.has_recipe() else ChunkStore.create(store.url, store.recipe)


def require_chunks(store: ChunkStore, chunks: Collection[int]) -> None:
    """Raise StoreError where the store has not all these chunks, which training reads."""
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
    """Register a run's students, and those alone, before anybody counts on what is there; returns
    their names."""
    own = [job.consumer(0) for job in jobs]
    for reader in own:
        join(store, reader)
    names = [reader.name for reader in own]
    for role in ("student", "control"):
        if (
            name := consumer_name(resume_location(jobs[0].section, jobs[0].run_dir), role)
        ) not in names:
            # of an earlier attempt with another config: it would keep every chunk for ever
            leave(store, name)
    return names


def register_if_allowed(store: ChunkStore, jobs: Sequence[TrainJob]) -> None:
    """Register a run's students, so that nobody deletes their chunks; say so where the store may
    only be read."""
    try:
        register(store, jobs)
    except StoreForbidden:
        say(
            f"{store.url} may only be read, so this training cannot be registered there: a run "
            "elsewhere with"
            ' store.retain = "until-read" may delete chunks that are still to be read here, which '
            "would end this command;"
            " what is committed stays"
        )


def retention_of(
    store: ChunkStore, order: Order, *, own: Collection[str], deletes: bool
) -> Retention:
    """The consumers of the store, the run's students (`own`, by name) among them, as they limit
    teachers that work in this order. `deletes`: a chunk that all are done with is deleted."""

    def position(reader: Consumer) -> int | None:
        same_order = (reader.seed, reader.window_chunks) == (order.seed, order.window_chunks)
        return (
            order_of(reader, store.recipe).chunks_finished(reader.committed_step)
            if same_order
            else None
        )

    return Retention(
        store,
        own=own,
        deletes=deletes,
        least_ahead=chunks_read_ahead(order),
        done_after=lambda reader: order_of(reader, store.recipe).steps_until_done_with(
            reader.total_steps
        ),
        position=position,
    )
