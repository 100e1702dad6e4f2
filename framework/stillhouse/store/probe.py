"""A probe of a store for create-only puts, by which everything is published: they have to fail
where the key is taken."""

from contextlib import suppress
from secrets import token_hex

from stillhouse.errors import StoreError
from stillhouse.store.object_store import Blobs


def require_create_only(blobs: Blobs, *, under: str = "") -> None:
    """Put an object, and put it again, which has to be refused; it is deleted afterwards. A
    directory is not tried: its file system refuses.

    Raises StoreError where a store, or a proxy before it, ignores the condition `If-None-Match: *`,
    or nothing may be written there.
    """
    if blobs.directory is not None:
        return
    key = f"{under}probe-{token_hex(8)}"
    try:
        is_replaced = blobs.create(key, b"first") and blobs.create(key, b"second")
    except StoreError:
        with suppress(StoreError):  # the first error is the one to raise
            blobs.delete(key)
        raise
    blobs.delete(key)
    if is_replaced:
        raise StoreError(
            f"{blobs.url} replaces an object that exists already, although it was asked not to "
            "(If-None-Match: *): machines that publish "
            "at once would overwrite each other's chunks and checkpoints. Use a store that "
            "honours conditional writes, or a newer version"
        )
