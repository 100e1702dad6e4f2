"""Directories that the machines of a run have to share: they are looked for on each machine before
anything is started."""

from collections.abc import Collection
from uuid import uuid4

from stillhouse.atomic import make_directory
from stillhouse.cluster.nodes import machines_without
from stillhouse.cluster.placement import Placement
from stillhouse.errors import ConfigError
from stillhouse.store import ChunkStore
from stillhouse.store.object_store import Blobs
from stillhouse.store.rollout_store import RolloutsPlace


def require_shared_store(
    store: ChunkStore, workers: Collection[Placement], *, filling: bool
) -> None:
    """As `require_shared`, for the chunks. A command that is not `filling` the store needs only to
    read it."""
    require_shared(
        store.url,
        workers,
        what="chunks",
        setting="store.url",
        published="" if filling else store.recipe_key,
    )


def require_shared_checkpoints(url: str, workers: Collection[Placement]) -> None:
    """As `require_shared`, for the checkpoints. Teachers are among the workers: the student is
    scored on a machine where one fits."""
    require_shared(url, workers, what="checkpoints", setting="student.checkpoint_url")


def require_shared_rollouts(
    places: Collection[RolloutsPlace], teachers: Placement, *, besides: str
) -> None:
    """As `require_shared`, for rollouts that teachers read; `besides` is a URL that they share."""
    for place in places:
        if place.url != besides:
            require_shared(
                place.url,
                [teachers],
                what="rollouts",
                setting="corpus.dataset",
                published=place.recipe_key,
            )


def require_shared(
    url: str, workers: Collection[Placement], *, what: str, setting: str, published: str = ""
) -> None:
    """Raise ConfigError where a machine with room for one of these processes does not see this
    machine's directory. A bucket is seen by all.

    A file is made in the directory, and looked for. Where none can be made and reading is enough,
    `published` is looked for: the key of an object that is there.
    """
    directory = Blobs(url).directory
    if directory is None:
        return

    # which machines do not see a file of this one
    mark = directory / f".shared-{uuid4().hex}"
    try:
        make_directory(directory)
        mark.touch()
    except OSError as error:
        if not published:
            raise ConfigError(
                f"{what} go to {directory}, where nothing can be written: {error.strerror}; give "
                f"{setting} another place"
            ) from None
        blind = machines_without(directory / published, workers)
    else:
        try:
            blind = machines_without(mark, workers)
        finally:
            mark.unlink(missing_ok=True)

    if blind:
        raise ConfigError(
            f"{what} go to {directory}, which is not the same directory on {_listed(blind)}; "
            f"give {setting} a bucket, or a directory that all machines mount"
        )


def _listed(addresses: list[str]) -> str:
    more = f" and {len(addresses) - 3} more" if len(addresses) > 3 else ""
    return ", ".join(addresses[:3]) + more
