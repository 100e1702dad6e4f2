"""Sealed JSON: values with their checksum beside them. A flipped bit or a cut file is found.

The checksum is the xxh3 of the values as JSON with sorted keys, so the layout of the file's text
does not matter. Files have it over one of two forms: `compact` is without spaces.
"""

import json
from collections.abc import Mapping
from typing import Any

import xxhash


def digest_of(values: Any, *, compact: bool = False) -> str:
    """The checksum of values, 16 hexadecimal digits."""
    separators = (",", ":") if compact else None
    return xxhash.xxh3_64_hexdigest(
        json.dumps(values, sort_keys=True, separators=separators).encode("ascii")
    )


def sealed(
    values: Mapping[str, Any], *, name: str = "xxh3", compact: bool = False
) -> dict[str, Any]:
    """The values, and behind them their checksum under this name."""
    return {**values, name: digest_of(values, compact=compact)}


def opened(whole: Any, *, name: str = "xxh3", compact: bool = False) -> dict[str, Any]:
    """The values without their checksum. Raises ValueError where it differs, and KeyError or
    TypeError where there is none."""
    values = {**whole}
    if values.pop(name) != digest_of(values, compact=compact):
        raise ValueError("its checksum differs")
    return values
