"""Writes tests/golden/places, a store with one of each thing that docs/format.md's section 9 has a
place for: `python tests/golden/make_places.py`. Nothing here imports stillhouse."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save

ROOT = Path(__file__).with_name("places")
RECIPE = "6ec79aef79cc4780"  # of the chunks that the label is of
RULES = {"max_tokens": 6, "prompts": "sha256:some-prompts", "samples": 2, "temperature": 1.0}
GRADER = {"kind": "exact-match", "version": 1}
STUDENT = {"kind": "a-student", "run": "demo-19acd3a5e00"}
SHARD, ROUNDS = 3, 120

SHARD_TENSORS = {  # two samples of one prompt; the second was cut at 6 tokens
    "prompts": np.array([7, 7], "<i8"),
    "samples": np.array([0, 1], "<i8"),
    "weights_version": np.array([ROUNDS, ROUNDS], "<i8"),
    "sampled_logprobs": np.array(
        [[0.0, -0.5, -0.25, 0.0, 0.0, 0.0], [0.0, -1.5, -0.125, -2.0, -0.75, 0.0]], "<f4"
    ),
    "positions": np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]], "<i4"),
    "token_ids": np.array([[11, 12, 30, 2, 0, 0], [11, 12, 31, 32, 33, 34]], "<i4"),
    "finish": np.array([0, 1], "u1"),
    "loss_mask": np.array([[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]], "u1"),
}


def main() -> None:
    # the label
    names = {
        "dataset": "~/documents.jsonl",
        "stillhouse": "0.1.0",
        "student": "org/a-student",
        "teacher": "org/a-t\u00eate",
        "tokenizer": "org/a-t\u00eate",
    }
    label = {"created": "2026-11-29T08:00:00Z", "names": names, "run": STUDENT["run"], "version": 1}
    put(f"{RECIPE}/labels/{label['run']}.json", canonical(label))

    # rollouts, and what a grader says of them
    rules = f"rollouts/{digest_of(RULES)[:16]}"
    put(f"{rules}/recipe.json", canonical(RULES))
    put(f"{rules}/shards/{SHARD:010d}.safetensors", shard(digest_of(RULES)))
    verdict = {"grader": GRADER, "scores": [1.0, 0.25], "version": 1}
    put(f"{rules}/verdicts/{digest_of(GRADER)[:16]}/{SHARD:010d}.json", canonical(verdict))

    # a version of a student
    weights = f"weights/{digest_of(STUDENT)[:16]}/{ROUNDS:010d}"
    model = save({"head.weight": np.array([[0.5, -0.25]], "<f4")})
    put(f"{weights}/model.safetensors", model)
    files = {
        "model.safetensors": {"bytes": len(model), "xxh3": xxhash.xxh3_64_hexdigest(model)},
    }
    manifest = {"files": files, "number": ROUNDS, "probe": [-0.5, -2.25], "version": 1}
    put(f"{weights}.json", canonical(manifest))


def shard(fingerprint: str) -> bytes:
    """The library puts the widest tensors first, as the page wants them."""
    body = b"".join(tensor.tobytes() for tensor in SHARD_TENSORS.values())
    about = {
        "fingerprint": fingerprint,
        "number": SHARD,
        "xxh3": xxhash.xxh3_64_hexdigest(body),
    }
    data = save(SHARD_TENSORS, {"stillhouse": canonical(about).decode()})
    assert data.endswith(body)
    return data


def canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode("ascii")


def digest_of(values: Any) -> str:
    return hashlib.sha256(canonical(values)).hexdigest()


def put(key: str, data: bytes) -> None:
    path = ROOT / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    main()
