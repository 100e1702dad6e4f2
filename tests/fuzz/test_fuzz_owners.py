"""Whatever an owner's record says, it names its holder or says that it cannot be read; never an
error."""

import json
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path

from helpers.bounded import bounded
from helpers.mutants import dumps, mutated_bytes, mutated_json
from helpers.sealing import sealed_json
from stillhouse.pipeline.holder import Holder, Record

HOLDER = Holder.here("stillhouse run first.toml", Path("/runs/first"), now=1.7e9)
MUTANTS = 1000


def mutant(rng: random.Random) -> bytes:
    """Its bytes changed, or its values, with the checksum that they then have."""
    values = {**asdict(HOLDER), "renewal": 3}
    if rng.random() < 0.2:
        return mutated_bytes(rng, HOLDER.packed(renewal=3))
    changed = mutated_json(rng, values)
    return dumps(sealed_json(changed) if isinstance(changed, dict) else changed)


def use(data: bytes) -> Record:
    record = Record.parsed(data)
    assert record.words()
    if record.holder is not None:
        assert record.holder.state() in ("alive", "gone", "unknown")
    return record


def test_a_record_names_its_holder_or_says_that_it_cannot_be_read(rng: random.Random) -> None:
    num_read = 0
    for _ in range(MUTANTS):
        data = mutant(rng)
        record = bounded(partial(use, data), num_bytes=len(data))
        assert record is not None
        assert record.data == data
        if record.holder is not None:
            num_read += 1
            values = asdict(record.holder)
            assert all(
                type(values[name]) is type(value) or name == "since"
                for name, value in asdict(HOLDER).items()
            ), data
            written = json.loads(data)
            checksum = written.pop("xxh3")
            assert sealed_json(written)["xxh3"] == checksum, data
            assert json.dumps(
                {**asdict(record.holder), **record.more}, sort_keys=True
            ) == json.dumps(written, sort_keys=True), data
    assert num_read > 0
