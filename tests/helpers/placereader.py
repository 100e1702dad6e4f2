"""A reader of labels, probes, rollouts, verdicts and weights that was written from section 9 of
docs/format.md alone: nothing here imports stillhouse."""

import hashlib
import itertools
import json
import math
import re
import struct
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xxhash

from helpers.pagereader import Refused, must

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
DTYPES = {"I64": "<i8", "F32": "<f4", "I32": "<i4", "U8": "u1"}
SHARD = {
    "prompts": "I64",
    "samples": "I64",
    "weights_version": "I64",
    "sampled_logprobs": "F32",
    "top_logprobs": "F32",
    "positions": "I32",
    "token_ids": "I32",
    "top_ids": "I32",
    "finish": "U8",
    "loss_mask": "U8",
}
OF_TOKENS = ("sampled_logprobs", "positions", "token_ids", "loss_mask")
OF_ENTRIES = ("top_logprobs", "top_ids")


def digest16(values: Any) -> str:
    """The name of what canonical JSON describes."""
    return hashlib.sha256(canonical(values)).hexdigest()[:16]


def canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode("ascii")


def read_json(data: bytes, *keys: str) -> dict[str, Any]:
    """An object of version 1 with exactly these other keys."""
    try:
        values = json.loads(data)
    except ValueError as error:
        raise Refused("JSON") from error
    must(type(values) is dict and set(values) == {*keys, "version"}, "these keys")
    must(canonical(values) == data, "canonical JSON")
    must(type(values["version"]) is int and values["version"] == 1, "version 1")
    return dict(values)


def read_label(data: bytes, run: str) -> dict[str, Any]:
    must(len(data) <= 65_536, "at most 65,536 bytes")
    label = read_json(data, "created", "names", "run")
    must(label["run"] == run and NAME.fullmatch(run) is not None, "the name of the file")
    must(type(label["names"]) is dict, "an object of names")
    must(all(type(name) is str for name in label["names"].values()), "names that are texts")
    try:
        created = datetime.strptime(label["created"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (TypeError, ValueError) as error:
        raise Refused("a time") from error
    must(f"{created:%Y-%m-%dT%H:%M:%SZ}" == label["created"], "a time in this form")
    return label


def read_probe(data: bytes, *, vocab_size: int, sequence_length: int) -> dict[str, Any]:
    keys = ("logprobs", "rounding_kl", "tail_logmass", "token_ids", "xxh3")
    probe = read_json(data, *keys)
    checksum = probe.pop("xxh3")
    must(checksum == xxhash.xxh3_64_hexdigest(canonical(probe)), "its checksum")
    num_targets = min(sequence_length, 64) - 1
    for name in ("logprobs", "tail_logmass", "token_ids"):
        must(len(probe[name]) == num_targets, "one for each target")
    for ids, logprobs in zip(probe["token_ids"], probe["logprobs"], strict=True):
        must(len(ids) == len(logprobs) == len(set(ids)), "entries of their own")
        must(all(0 <= token < vocab_size for token in ids), "ids of the vocabulary")
        order = [(-logprob, token) for token, logprob in zip(ids, logprobs, strict=True)]
        must(order == sorted(order), "the highest first, ties by id")
    must(probe["rounding_kl"] is None or type(probe["rounding_kl"]) is float, "a rounding")
    return probe


def read_verdict(data: bytes, grader: str, *, num_rollouts: int) -> list[float]:
    verdict = read_json(data, "grader", "scores")
    must(digest16(verdict["grader"]) == grader, "the grader of this name")
    must(type(verdict["scores"]) is list, "a list of scores")
    must(len(verdict["scores"]) == num_rollouts, "a score for each rollout")
    must(all(type(score) in (int, float) for score in verdict["scores"]), "numbers")
    return list(verdict["scores"])


def read_manifest(data: bytes, number: int) -> dict[str, Any]:
    manifest = read_json(data, "files", "number", "probe")
    must(manifest["number"] == number, "the number of the file")
    for file in manifest["files"].values():
        must(set(file) == {"bytes", "xxh3"}, "size and checksum of a file")
    must(all(logprob <= 0 for logprob in manifest["probe"]), "log-probabilities")
    return manifest


def read_shard(data: bytes, fingerprint: str, number: int) -> dict[str, np.ndarray]:
    # the header
    must(len(data) >= 8, "a length")
    (header_bytes,) = struct.unpack("<Q", data[:8])
    must(header_bytes <= min(8192, len(data) - 8), "a header length of at most 8192")
    text, body = data[8 : 8 + header_bytes], data[8 + header_bytes :]
    try:
        header = json.loads(text.decode("ascii"))
        about = json.loads(header["__metadata__"]["stillhouse"])
        num_rows, length = (int(size) for size in header["token_ids"]["shape"])
        num_entries = int(header["top_ids"]["shape"][2]) if "top_ids" in header else 0
    except (ValueError, LookupError, TypeError) as error:
        raise Refused("a header of the page's shape") from error
    wanted = {
        "fingerprint": fingerprint,
        "number": number,
        "xxh3": xxhash.xxh3_64_hexdigest(body),
    }
    must(about == wanted, "fingerprint, number and checksum")
    metadata = {"stillhouse": canonical(about).decode()}

    # the tensors
    start, tensors, described = 0, {}, dict[str, Any]({"__metadata__": metadata})
    must("top_ids" not in header or num_entries >= 1, "an entry at least")
    for name, dtype in SHARD.items():
        shape = [num_rows, length] if name in OF_TOKENS else [num_rows]
        if name in OF_ENTRIES:
            if not num_entries:
                continue
            shape = [num_rows, length, num_entries]
        end = start + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        must(end <= len(body), "no end before the last tensor's")
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        tensors[name] = np.frombuffer(body[start:end], DTYPES[dtype]).reshape(shape)
        start = end
    must(start == len(body), "an end where the last tensor ends")
    must(header == described, "the page's tensors and no others")
    must_be_rollouts(tensors)
    return tensors


def must_be_rollouts(tensors: dict[str, np.ndarray]) -> None:
    """The values of a shard."""
    mask, logprobs = tensors["loss_mask"], tensors["sampled_logprobs"]
    for row, positions in zip(mask, tensors["positions"].tolist(), strict=True):
        must(
            positions[0] == 0
            and all(after in (0, before + 1) for before, after in itertools.pairwise(positions)),
            "rollouts have positions",
        )
        must(set(row.tolist()) <= {0, 1} and row[-1] == 0, "rollouts have a mask")
        must(
            not row[:-1][np.array(positions[1:]) == 0].any(),
            "rollouts have a mask within documents",
        )
    must(bool((tensors["token_ids"] >= 0).all()), "rollouts have ids")
    must(
        bool((tensors["prompts"] >= 0).all() and (tensors["samples"] >= 0).all()),
        "rollouts have numbers",
    )
    must(
        bool((logprobs <= 0).all() and np.isfinite(logprobs).all()),
        "rollouts have log-probabilities",
    )
    must(not logprobs[mask == 0].any(), "rollouts have log-probabilities of what was sampled alone")
    must(bool((tensors["finish"] <= 2).all()), "rollouts have an end")
    must(bool((tensors["weights_version"] >= -1).all()), "rollouts have a version of weights")
    if "top_ids" in tensors:
        must_be_told(tensors)


def must_be_told(tensors: dict[str, np.ndarray]) -> None:
    """The values of the two tensors of entries."""
    for mask, finish, ids, logprobs in zip(
        tensors["loss_mask"],
        tensors["finish"],
        tensors["top_ids"].tolist(),
        tensors["top_logprobs"].tolist(),
        strict=True,
    ):
        told = []
        for at, (entries, values) in enumerate(zip(ids, logprobs, strict=True)):
            if min(entries) < 0:
                must(set(entries) == {-1}, "rollouts have all entries of a token or none")
                must(all(map(math.isnan, values)), "rollouts have a log-probability of an id alone")
                continue
            told.append(at)
            pairs = [*zip((-value for value in values), entries, strict=True)]
            must(pairs == sorted(set(pairs)), "rollouts have entries in order")
            must(len(set(entries)) == len(entries), "rollouts have an id once")
            must(all(-math.inf < value <= 0 for value in values), "rollouts have log-probabilities")
            must(sum(map(math.exp, values)) <= 1.001, "rollouts have probabilities")
        sampled = np.flatnonzero(mask).tolist()
        must(
            told in ([], sampled) or (told == sampled[:-1] and finish == 0),
            "rollouts have entries of all sampled tokens, or of all but the end",
        )
