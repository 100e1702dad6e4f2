"""A reader of chunks, records and recipes that was written from docs/format.md alone: nothing here
imports stillhouse."""

import itertools
import json
import math
import struct
from typing import Any

import numpy as np
import xxhash

DTYPES = {"U64": "<u8", "I64": "<i8", "I32": "<i4", "U8": "u1"}
SAME_AS_RECIPE = (
    "codec",
    "codec_version",
    "format",
    "k",
    "num_draws",
    "temperature",
    "value_bits",
    "vocab_size",
)


def same_as_recipe(recipe: dict[str, Any]) -> tuple[str, ...]:
    """Keys of a chunk's metadata that are those of its recipe."""
    only_in_2 = ("draws", "label_logprob", "tail_entropy")
    return SAME_AS_RECIPE + (only_in_2 if recipe["format"] == 2 else ())


IN_PYTHON = ("source_kind", "teacher_kind", "weighted", "label_logprob", "tail_entropy")


class Refused(Exception):
    """The page says that a reader must refuse this."""


def must(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


def elias_fano_bytes(num_ids: int, vocab_size: int) -> tuple[int, int]:
    """Section 4: bytes of the low and of the high stream."""
    if num_ids == 0:
        return 0, 0
    low = max(0, math.floor(math.log2(vocab_size / num_ids)))
    return math.ceil(num_ids * low / 8), math.ceil((num_ids + ((vocab_size - 1) // 2**low) + 1) / 8)


def record_bytes(recipe: dict[str, Any]) -> int:
    k, draws, vocab_size = recipe["k"], recipe["num_draws"], recipe["vocab_size"]
    values: int = math.ceil(k * recipe["value_bits"] / 8)
    ids = sum(elias_fano_bytes(k, vocab_size)) + sum(elias_fano_bytes(draws, vocab_size))
    more: int = draws if recipe.get("draws") == "weighted" else 0
    halves: int = recipe.get("label_logprob", 0) + recipe.get("tail_entropy", 0)
    return (4 if k else 0) + values + ids + more + halves


def bits_of(stream: bytes) -> list[int]:
    return [byte >> i & 1 for byte in stream for i in range(8)]


def numbers_in(stream: bytes, count: int, width: int) -> list[int]:
    bits = bits_of(stream)
    must(not any(bits[count * width :]), "left-over bits are 0")
    return [sum(bits[i * width + j] << j for j in range(width)) for i in range(count)]


def read_ids(stream: bytes, count: int, vocab_size: int) -> list[int]:
    low_bytes = elias_fano_bytes(count, vocab_size)[0]
    low = max(0, math.floor(math.log2(vocab_size / count)))
    ones = [p for p, bit in enumerate(bits_of(stream[low_bytes:])) if bit]
    must(len(ones) == count, "as many ones as ids")
    ids = [
        (p - i) * 2**low + a
        for i, (p, a) in enumerate(
            zip(ones, numbers_in(stream[:low_bytes], count, low), strict=True)
        )
    ]
    must(ids == sorted(ids) and ids[-1] < vocab_size, "ids ascend and stay below V")
    return ids


def read_record(record: bytes, recipe: dict[str, Any]) -> dict[str, Any]:
    """Section 4."""
    k, num_draws, vocab_size = recipe["k"], recipe["num_draws"], recipe["vocab_size"]
    sizes = [
        4 if k else 0,
        sum(elias_fano_bytes(k, vocab_size)),
        math.ceil(k * recipe["value_bits"] / 8),
        sum(elias_fano_bytes(num_draws, vocab_size)),
        num_draws if recipe.get("draws") == "weighted" else 0,
        recipe.get("label_logprob", 0),
    ]
    header, ids_bytes, values, draws_bytes, weights, label, entropy = (
        bytes(part) for part in np.split(np.frombuffer(record, "u1"), np.cumsum(sizes))
    )
    entries, log_tail, least = [], 0.0, 0.0
    if k:
        ids = read_ids(ids_bytes, k, vocab_size)
        must(len(set(ids)) == k, "no kept id twice")
        r_max, log_tail = struct.unpack("<ee", header)
        must(1 <= r_max <= 40, "R from 1 to 40")
        must(
            log_tail == -math.inf if k == vocab_size else log_tail <= -(2**-24),
            "log tail is of a probability",
        )
        top = 2 ** recipe["value_bits"] - 1
        codes = numbers_in(values, k, recipe["value_bits"])
        must(min(codes) == 0 and (max(codes) == top or r_max == 1), "codes from 0 to T")
        roots = [(math.sqrt(1 + r_max) - 1) * code / top for code in codes]
        drops = [x * (2 + x) for x in roots]
        best = math.log1p(-math.exp(log_tail)) - math.log(sum(math.exp(-drop) for drop in drops))
        least = best - max(drops)
        entries = sorted((-(best - drop), token) for drop, token in zip(drops, ids, strict=True))
    draws = read_ids(draws_bytes, num_draws, vocab_size) if num_draws else []
    target = {
        "ids": [i for _, i in entries],
        "logprobs": [-m for m, _ in entries],
        "tail_logmass": log_tail,
        "draws": draws,
    }
    return target | read_more(draws, least, weights=weights, label=label, entropy=entropy)


def read_more(
    draws: list[int], least: float, *, weights: bytes, label: bytes, entropy: bytes
) -> dict[str, Any]:
    """Section 4: what a record of format 2 may have more."""
    more: dict[str, Any] = {}
    if weights:
        codes = dict(zip(draws, weights, strict=True))
        must([codes[token] for token in draws] == list(weights), "one code for one drawn id")
        roots = [code / 255 * (math.sqrt(41) - 1) for code in weights]
        more["draw_logprobs"] = [least - x * (2 + x) for x in roots]
    if label:
        (more["label_logprob"],) = struct.unpack("<e", label)
        must(-65504 <= more["label_logprob"] <= -(2**-24), "the label's log-probability")
    if entropy:
        (more["tail_entropy"],) = struct.unpack("<e", entropy)
        must(entropy[1] < 0x80 and more["tail_entropy"] <= 65504, "the tail's entropy")
    return more


def read_index(
    data: bytes, recipe: dict[str, Any], fingerprint: str, number: int
) -> tuple[dict[str, np.ndarray], int]:
    """Sections 3 and 5, rules 1 to 5: the tensors as they lie, and S."""
    must(len(data) >= 8, "a length")
    (header_bytes,) = struct.unpack("<Q", data[:8])
    must(header_bytes <= min(8192, len(data) - 8), "a header length of at most 8192")
    text = data[8 : 8 + header_bytes]
    try:
        header = json.loads(text.decode("ascii"))
        metadata = json.loads(header["__metadata__"]["stillhouse"])
        num_targets = int(header["targets"]["shape"][0])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Refused("a header of the page's shape") from error
    must(list(header["__metadata__"]) == ["stillhouse"], "one metadata key")
    wanted = {key: recipe[key] for key in same_as_recipe(recipe)} | {
        "chunk": number,
        "fingerprint": fingerprint,
    }
    must(
        {key: value for key, value in metadata.items() if key != "xxh3"} == wanted,
        "the recipe's metadata",
    )
    first = number * recipe["chunk_sequences"]
    rows, length = (
        min(recipe["chunk_sequences"], recipe["num_sequences"] - first),
        recipe["sequence_length"],
    )
    must(0 <= num_targets <= rows * (length - 1), "N within the rows")
    shapes = {
        "row_xxh3": ("U64", [rows]),
        "row_starts": ("I64", [rows + 1]),
        "positions": ("I32", [rows, length]),
        "token_ids": ("I32", [rows, length]),
        "loss_mask": ("U8", [rows, length]),
        "targets": ("U8", [num_targets, record_bytes(recipe)]),
    }
    must(set(header) == {"__metadata__", *shapes}, "six tensors")
    start, tensors = 8 + header_bytes, {}
    for name, (dtype, shape) in shapes.items():
        end = start + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        offsets = [start - 8 - header_bytes, end - 8 - header_bytes]
        must(
            header[name] == {"dtype": dtype, "shape": shape, "data_offsets": offsets},
            f"{name} in its place",
        )
        must(end <= len(data), "no end before the last tensor's")
        tensors[name] = np.frombuffer(data[start:end], DTYPES[dtype]).reshape(shape)
        start = end
    must(start == len(data), "an end where the last tensor ends")
    index_end = 8 + header_bytes + 16 * rows + 8
    before, *after = text.split(b'\\"xxh3\\":\\"')
    must(len(after) == 1, "one checksum")
    at = 8 + len(before) + 11
    blank = data[:at] + b"0" * 16 + data[at + 16 : index_end]
    must(xxhash.xxh3_64_hexdigest(blank) == metadata["xxh3"], "the checksum")
    starts = tensors["row_starts"]
    must(
        bool(starts[0] == 0 and starts[-1] == num_targets and (np.diff(starts) >= 0).all()),
        "row_starts from 0 to N",
    )
    return tensors, rows


def read_chunk(
    data: bytes, recipe: dict[str, Any], fingerprint: str, number: int
) -> dict[str, Any]:
    tensors, rows = read_index(data, recipe, fingerprint, number)
    starts, targets = tensors["row_starts"], []
    for row in range(rows):
        ids, positions, mask = (
            tensors[name][row] for name in ("token_ids", "positions", "loss_mask")
        )
        records = tensors["targets"][starts[row] : starts[row + 1]]
        hashed = ids.tobytes() + positions.tobytes() + mask.tobytes() + records.tobytes()
        must(xxhash.xxh3_64_intdigest(hashed) == tensors["row_xxh3"][row], "the row's hash")
        must(((ids >= 0) & (ids < recipe["vocab_size"])).all(), "ids below V")
        must(
            positions[0] == 0
            and all(after in (0, before + 1) for before, after in itertools.pairwise(positions)),
            "positions",
        )
        must(
            set(mask.tolist()) <= {0, 1}
            and mask[-1] == 0
            and not mask[:-1][positions[1:] == 0].any(),
            "the mask",
        )
        must(mask.sum() == len(records), "a record for each 1")
        targets += [read_record(record.tobytes(), recipe) for record in records]
    columns = {name: tensors[name].tolist() for name in ("token_ids", "positions", "loss_mask")}
    return {**columns, "targets": targets}


def recipe_json(values: dict[str, Any]) -> bytes:
    """Section 2, for a recipe whose texts are ASCII, by the fields of a `Recipe`."""
    version = values.get("format", 1)
    whole = {
        **{name: value for name, value in values.items() if name not in IN_PYTHON},
        "format": version,
        "codec": f"ef-sqrt{values['value_bits']}",
        "codec_version": version,
    }
    if version == 2:
        names = ("corpus_digest", "teacher_digest", "teacher_dtype")
        corpus_digest, teacher_digest, numerics = (whole.pop(name) for name in names)
        whole |= {
            "source": {"kind": values["source_kind"], "digest": corpus_digest},
            "teacher": {
                "kind": values["teacher_kind"],
                "digest": teacher_digest,
                "numerics": numerics,
            },
            "draws": "weighted" if values["weighted"] else "ids",
            "label_logprob": 2 if values["label_logprob"] else 0,
            "tail_entropy": 2 if values["tail_entropy"] else 0,
        }
    return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode("ascii")
