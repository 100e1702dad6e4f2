"""Directories that the machines of a run have to share: looked for on each of them before anything
is started."""

from collections.abc import Collection
from uuid import uuid4

from stillhouse.atomic import make_directory
from stillhouse.cluster.nodes import machines_without
from stillhouse.cluster.placement import Placement
from stillhouse.errors import ConfigError
from stillhouse.store import ChunkStore
from stillhouse.store.object_store import Blobs


def require_shared_store(store: ChunkStore, crews: Collection[Placement], *, filling: bool) -> None:
    """As `require_shared`; a command that is not `filling` the store needs to read there only."""
    require_shared(
        store.url,
        crews,
        what="chunks",
        setting="store.url",
        published="" if filling else store.recipe_key,
    )


def require_shared_checkpoints(url: str, crews: Collection[Placement]) -> None:
    """As `require_shared`, of teachers, too: the student is scored where one fits."""
    require_shared(url, crews, what="checkpoints", setting="student.checkpoint_url")


def require_shared(
    url: str, crews: Collection[Placement], *, what: str, setting: str, published: str = ""
) -> None:
    """Raise ConfigError where a machine that may have one of these crews does not see this
    machine's directory. All see a bucket.

    A file is made in it, to be looked for. Where none can be made, `published` is looked for: the
    key of an object that is there, given where it is enough to read.
    """
    directory = Blobs(url).directory
    if directory is None:
        return
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
        blind = machines_without(directory / published, crews)
    else:
        try:
            blind = machines_without(mark, crews)
        finally:
            mark.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"{what} go to {directory}, which is not the same directory on {_listed(blind)}; "
            f"give {setting} a bucket, or a directory that all machines mount"
        )


def _listed(addresses: list[str]) -> str:
    few = ", ".join(addresses[:3])
    return few if len(addresses) <= 3 else f"{few} and {len(addresses) - 3} more"
