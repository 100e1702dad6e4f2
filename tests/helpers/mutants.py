"""Mutants of bytes and of JSON values, as damage, other versions and attackers make them. A seeded
generator decides each one."""

import copy
import json
import random
from typing import Any

_DEEP, _LONG = "@deep@", "@long@"  # stand for what `json.dumps` cannot write
_STRANGE_NUMBERS = (
    0,
    -1,
    1,
    2,
    7,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**61,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
)
_STRANGE_FLOATS = (0.0, -0.0, 1.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
_STRANGE_TEXTS = (
    "",
    "x",
    "..",
    "../x",
    "/etc/passwd",
    "a\x00b",
    "\ud800",
    "\x1b[2J",
    "\u0663",
    "1",
    "NaN",
    "a" * 300,
    _DEEP,
    _LONG,
)
_STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    *_STRANGE_NUMBERS,
    *_STRANGE_FLOATS,
    *_STRANGE_TEXTS,
    [],
    {},
    [[]],
    [1],
    {"": 0},
    {"a": [1, {}]},
)
_Place = tuple[Any, Any]  # a container, and the key or index of a value in it


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes: bits, bytes and runs of them are flipped, overwritten, cut out, doubled
    and moved."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change_bytes(rng, changed)
    return bytes(changed)


def _change_bytes(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 64)))
    match rng.randrange(8):
        case 0 | 1 if start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        case 2 if start < len(data):
            data[start] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        case 3:
            del data[start:end]
        case 4:
            data[start:start] = rng.choice(
                (
                    data[start:end],
                    b"\0" * 8,
                    b"[" * 3000,
                    b'{"a":' * 3000,
                    b"9" * 5000,
                    rng.randbytes(9),
                )
            )
        case 5:
            data[start:end] = rng.choice((b"\0", b"\xff")) * (end - start)
        case 6:
            del data[start:]
        case _:
            other = rng.randrange(len(data) + 1)
            data[start:end] = data[other : other + end - start]


def mutated_json(rng: random.Random, value: Any) -> Any:
    """One to three values or keys replaced, nudged, removed, added, wrapped or exchanged; the
    original stays as it is."""
    box = {"root": copy.deepcopy(value)}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_json(rng, box)
    return box["root"]


def _change_json(rng: random.Random, box: dict[str, Any]) -> None:
    places = list(_places(box))
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0 | 1:
            holder[key] = copy.deepcopy(rng.choice(_STRANGE))
        case 2 | 3:
            holder[key] = _nudged(rng, holder[key])
        case 4 if holder is not box:
            del holder[key]
        case 5 if isinstance(holder[key], dict):
            holder[key][
                rng.choice(("more", "", "xxh3", "version", "\ud800", *map(str, holder[key])))
            ] = copy.deepcopy(rng.choice(_STRANGE))
        case 6 if isinstance(holder, dict) and holder is not box and rng.random() < 0.5:
            holder[rng.choice(("../x", "/etc/passwd", "a/b", "..", key + "x"))] = holder.pop(key)
        case 6:
            holder[key] = rng.choice(
                ([holder[key]], {"a": holder[key]}, [holder[key], holder[key]])
            )
        case _:
            other, other_key = rng.choice(places)
            if not isinstance(holder[key], (dict, list)) and not isinstance(
                other[other_key], (dict, list)
            ):
                holder[key], other[other_key] = other[other_key], holder[key]


def _places(container: Any) -> "list[_Place]":
    keys = (
        list(container)
        if isinstance(container, dict)
        else range(len(container))
        if isinstance(container, list)
        else ()
    )
    found = []
    for key in keys:
        found += [(container, key), *_places(container[key])]
    return found


def _nudged(rng: random.Random, value: Any) -> Any:
    """A value near this one, or the same in another type."""
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None, 0, 1))
    if isinstance(value, int):
        return rng.choice(
            (
                value + 1,
                value - 1,
                -value,
                value * 2,
                value << 32,
                value + 2**64,
                float(value) if value < 2**60 else 0.5,
                str(value),
            )
        )
    if isinstance(value, float):
        return rng.choice(
            (value * 2, -value, 0.0, str(value), int(value) if abs(value) < 1e300 else 0)
        )
    if isinstance(value, str):
        return rng.choice(
            (
                value + "x",
                value[:-1],
                value.upper(),
                value[::-1],
                "../" + value,
                value + "\0",
                value + "\n",
            )
        )
    if isinstance(value, list):
        return rng.choice(
            (
                value[:-1],
                value + value[-1:],
                value[::-1],
                {str(at): each for at, each in enumerate(value)},
            )
        )
    return rng.choice((list(value), list(value.items()) if isinstance(value, dict) else [], {}))


def dumps(value: Any, **style: Any) -> bytes:
    """JSON text of a mutant. A mark becomes what cannot be written otherwise: 3,000 brackets, or a
    number of 5,000 digits."""
    text = json.dumps(value, **style)
    text = text.replace(json.dumps(_DEEP), "[" * 3000 + "]" * 3000).replace(
        json.dumps(_LONG), "9" * 5000
    )
    return text.encode("utf-8", "surrogatepass")
