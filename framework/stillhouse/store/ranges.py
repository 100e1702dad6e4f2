"""Byte ranges of an object: near ones are merged, so that they share a request, and cut apart
again.

Merged here, not by obstore: obstore's own merging panics when the object is shorter than the reader
believes.
"""

from collections.abc import Iterable, Mapping

Extent = tuple[int, int]  # (start, end)

_MERGE_BYTES = 256 << 10  # reading on over a gap of this size costs less than another request


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """Spans that cover all extents that are not empty, in order and apart from one another."""
    spans: list[Extent] = []
    for start, end in sorted(extent for extent in extents if extent[0] < extent[1]):
        if spans and start <= spans[-1][1] + _MERGE_BYTES:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def cut(pieces: Mapping[Extent, memoryview], extent: Extent) -> memoryview:
    """The bytes of an extent out of the pieces that were read; none where no piece covers it."""
    start, end = extent
    for (first, last), piece in pieces.items():
        if first <= start and end <= last:
            return piece[start - first : end - first]
    return memoryview(b"")
