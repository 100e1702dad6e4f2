"""The requests to an object store: which functions of obstore are used, and how a store is opened.

Tests pass an `ObjectLayer` of their own in place of obstore.
"""

import functools
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import obstore
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

# obstore limits the time of a whole answer, to 30 s where it is given no limit
_NO_LIMIT = timedelta(days=30)


class ObjectLayer(Protocol):
    """The functions of `obstore` of these names: the same arguments, results and exceptions."""

    def put(
        self, store: Any, path: str, file: Any, *, mode: Any = ..., use_multipart: bool | None = ...
    ) -> Any: ...

    def open_writer(
        self, store: Any, path: str, *, buffer_size: int = ..., max_concurrency: int = ...
    ) -> Any: ...

    def head(self, store: Any, path: str) -> Any: ...

    def get(self, store: Any, path: str, *, options: Any = ...) -> Any: ...

    def get_ranges(
        self, store: Any, path: str, *, starts: Any, ends: Any, coalesce: int = ...
    ) -> Any: ...

    def list(self, store: Any, prefix: str | None = ..., *, chunk_size: int = ...) -> Any: ...

    def list_with_delimiter(self, store: Any, prefix: str | None = ...) -> Any: ...

    def delete(self, store: Any, paths: Any) -> None: ...

    def rename(self, store: Any, from_: str, to: str) -> None: ...


OBSTORE = cast("ObjectLayer", obstore)  # a module: its functions are these


def open_store(url: str, *, patience_s: float) -> ObjectStore:
    """The obstore store of an absolute URL or path. A directory is made.

    A request is tried again for `patience_s` where the store refuses it or is busy. A store that
    sends nothing is given up after twice as long; an answer that goes on coming has no limit.
    """
    if "://" not in url:
        return LocalStore(Path(url), mkdir=True)
    if url.startswith("memory:"):
        return _memory_store(url)
    # These replace all client options of the environment, AWS_ALLOW_HTTP among them; the URL of an
    # endpoint says http or https itself.
    client: ClientConfig = {
        "connect_timeout": "5s",
        "read_timeout": timedelta(seconds=2 * patience_s),
        "timeout": _NO_LIMIT,
        "allow_http": True,
    }
    retry: RetryConfig = {
        "max_retries": 1000,
        "retry_timeout": timedelta(seconds=patience_s),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }
    return from_url(url, client_options=client, retry_config=retry)


@functools.cache
def _memory_store(_url: str) -> MemoryStore:
    """The store of a memory:// URL: one for each URL and process."""
    return MemoryStore()
