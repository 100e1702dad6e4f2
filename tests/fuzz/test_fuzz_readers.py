"""Whatever a reader's file says, it is a reader whose way through the chunks can be computed, or a stranger; never an error."""

import json
import random
from dataclasses import asdict
from pathlib import Path

from helpers.bounded import bounded
from helpers.chunks import small_recipe
from helpers.mutants import dumps, mutated_bytes, mutated_json
from helpers.sealing import sealed_json
from stillhouse.store import ChunkStore, Reader
from stillhouse.store.readers import join, registered
from stillhouse.student.loader import order_of_reader

READER = Reader(name="a-student", global_batch_sequences=8, seed=3, window_chunks=4, total_steps=100, committed_step=7)
MUTANTS = 500


def mutant(rng: random.Random) -> bytes:
    """Its bytes changed, or its values, with the checksum that they then have."""
    values = {**asdict(READER), "version": 1}
    if rng.random() < 0.2:
        return mutated_bytes(rng, dumps(sealed_json(values, sort_keys=True), sort_keys=True, separators=(",", ":")))
    changed = mutated_json(rng, values)
    if not isinstance(changed, dict):
        return dumps(changed)
    return dumps(sealed_json(changed, sort_keys=True), sort_keys=True, separators=(",", ":"))


def test_a_readers_file_is_a_reader_or_a_stranger_and_others_are_found_beside_it(rng: random.Random, tmp_path: Path) -> None:
    store = ChunkStore.create(str(tmp_path / "store"), small_recipe())
    join(store, READER)
    folder = Path(store.url) / store.folder / "readers"
    num_read = 0
    for _ in range(MUTANTS):
        data = mutant(rng)
        name = json.loads(data)["name"] if b'"name":"b-student"' in data else "b-student"
        (folder / f"{name}.json").write_bytes(data.replace(b'"a-student"', b'"b-student"') if rng.random() < 0 else data)
        found = bounded(lambda: registered(store), num_bytes=len(data))
        assert found is not None
        assert READER in found.readers, data
        assert len(found.readers) + len(found.strangers) == 2, data
        for reader in found.readers:
            num_read += reader != READER
            bounded(
                lambda reader=reader: order_of_reader(reader, store.recipe).steps_until_done_with(reader.total_steps), num_bytes=len(data)
            )
    assert num_read > 0
