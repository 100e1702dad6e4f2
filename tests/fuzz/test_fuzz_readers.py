"""Whatever a consumer's file holds: it is understood, and the consumer's order of chunks can be
computed, or it is reported as unknown; never an error."""

import json
import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from helpers.bounded import bounded
from helpers.chunks import small_recipe
from helpers.mutants import dumps, mutated_bytes, mutated_json
from helpers.sealing import sealed_json
from stillhouse.store import ChunkStore, Consumer
from stillhouse.store.consumers import join, registered
from stillhouse.student.job import order_of

CONSUMER = Consumer(
    name="a-student",
    global_batch_sequences=8,
    seed=3,
    window_chunks=4,
    total_steps=100,
    committed_step=7,
)
OTHER = replace(CONSUMER, name="b-student")
MUTANTS = 500


def mutant(rng: random.Random) -> bytes:
    """Its bytes changed, or its values, with the checksum that they then have."""
    values = {**asdict(OTHER), "version": 1}
    canonical = {"sort_keys": True, "separators": (",", ":")}
    if rng.random() < 0.2:
        return mutated_bytes(rng, dumps(sealed_json(values, sort_keys=True), **canonical))
    changed = mutated_json(rng, values)
    return dumps(
        sealed_json(changed, sort_keys=True) if isinstance(changed, dict) else changed, **canonical
    )


def test_a_consumers_file_is_understood_or_unknown_and_others_are_found_beside_it(
    rng: random.Random, tmp_path: Path
) -> None:
    store = ChunkStore.create(str(tmp_path / "store"), small_recipe())
    join(store, CONSUMER)
    path = Path(store.url) / store.folder / "readers" / "b-student.json"
    num_read = 0
    for _ in range(MUTANTS):
        data = mutant(rng)
        path.write_bytes(data)
        found = bounded(lambda: registered(store), num_bytes=len(data))
        assert found is not None
        first, *others = found.consumers
        assert first == CONSUMER, data
        assert len(others) + len(found.unknown) == 1, data
        for reader in others:
            num_read += 1
            assert reader.name == path.stem, data
            assert dumps(
                sealed_json({**asdict(reader), "version": 1}, sort_keys=True), sort_keys=True
            ) == dumps(json.loads(data), sort_keys=True), data
            order = order_of(reader, store.recipe)
            done = bounded(
                partial(order.steps_until_done_with, reader.total_steps),
                num_bytes=len(data),
            )
            assert done is not None
            assert len(done) == store.recipe.num_chunks
    assert num_read > 0
