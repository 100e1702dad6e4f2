"""JSON values with their checksum beside them: a flipped bit or a cut file is seen, whatever the
layout of the text.

The checksum is the xxh3 of the values as JSON with sorted keys. Two forms of that are in files:
`compact` has no spaces.
"""

import json
from collections.abc import Mapping
from typing import Any

import xxhash


def digest_of(values: Any, *, compact: bool = False) -> str:
    """16 hexadecimal digits."""
    separators = (",", ":") if compact else None
    return xxhash.xxh3_64_hexdigest(
        json.dumps(values, sort_keys=True, separators=separators).encode("ascii")
    )


def sealed(
    values: Mapping[str, Any], *, name: str = "xxh3", compact: bool = False
) -> dict[str, Any]:
    """The values, and last their checksum under this name."""
    return {**values, name: digest_of(values, compact=compact)}


def opened(whole: Any, *, name: str = "xxh3", compact: bool = False) -> dict[str, Any]:
    """The values without their checksum. Raises ValueError where it is not theirs; KeyError or
    TypeError where there can be none."""
    values = {**whole}
    if values.pop(name) != digest_of(values, compact=compact):
        raise ValueError("its checksum differs")
    return values
