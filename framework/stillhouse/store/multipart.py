"""A multipart upload: an object of any size is written to an object store in parts, and has its key
only once it is whole."""

from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from obstore.store import ObjectStore

from stillhouse.store.explain import FAILURES
from stillhouse.store.object_layer import ObjectLayer

# S3 takes 10,000 parts, so an object has up to 312 GB
_PART_BYTES = 32 << 20
_PARTS_IN_FLIGHT = 4
# handed to obstore at one time; more does not fit into a cache, and holds the interpreter's lock
_WRITE_BYTES = 2 << 20


class MultipartUpload:
    """One upload, used in a `with`. Without `replace`, the key stays as it was. Raises one of
    FAILURES.

    Holds at most 160 MiB at one time. `atomic.Staging` has the same methods, for a local file.
    """

    def __init__(self, objects: ObjectLayer, store: ObjectStore, key: str) -> None:
        self._is_open = True
        self._writer: Any = objects.open_writer(
            store, key, buffer_size=_PART_BYTES, max_concurrency=_PARTS_IN_FLIGHT
        )

    def write(self, data: bytes | memoryview) -> None:
        """Append these bytes. Their owner may change them as soon as this returns."""
        with memoryview(data) as whole:
            for start in range(0, len(whole), _WRITE_BYTES):
                # a copy, because obstore sends it later
                self._writer.write(bytes(whole[start : start + _WRITE_BYTES]))

    def replace(self) -> None:
        """Put the object, in place of what is there."""
        self._is_open = False
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_open and error is not None:  # with an error, obstore aborts the upload
            with suppress(*FAILURES):
                self._writer.__exit__(kind, error, trace)
