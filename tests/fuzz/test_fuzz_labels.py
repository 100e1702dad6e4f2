"""Whatever a label's file holds: it is a label where the page says so, else it is broken; never an
error."""

import random
from pathlib import Path

from helpers.bounded import bounded
from helpers.chunks import small_recipe
from helpers.mutants import dumps, mutated_bytes, mutated_json
from helpers.pagereader import Refused
from helpers.placereader import canonical, read_label
from stillhouse.store import ChunkStore
from stillhouse.store.labels import Label, Labels, labels_of, put_label

LABEL = Label(run="a", created="2026-11-29T08:00:00Z", names={"teacher": "org/a-t\u00eate"})
VALUES = {"created": LABEL.created, "names": {"t": "a", "d": "b"}, "run": "b", "version": 1}
MUTANTS = 250


def mutant(rng: random.Random) -> bytes:
    """Its bytes changed, or its values, in canonical form."""
    if rng.random() < 0.4:
        return mutated_bytes(rng, canonical(VALUES))
    return dumps(mutated_json(rng, VALUES), sort_keys=True, separators=(",", ":"))


def page_reads(data: bytes) -> bool:
    try:
        read_label(data, "b")
    except (Refused, RecursionError):
        return False
    return True


def test_a_label_is_read_where_the_page_says_so_and_else_is_broken(
    rng: random.Random, tmp_path: Path
) -> None:
    store = ChunkStore.create(str(tmp_path / "store"), small_recipe())
    put_label(store, LABEL)
    path = Path(store.url) / store.folder / "labels" / "b.json"
    num_read = 0
    for _ in range(MUTANTS):
        data = mutant(rng)
        path.write_bytes(data)
        found = bounded(lambda: labels_of(store), num_bytes=len(data))
        assert isinstance(found, Labels)
        assert LABEL in found.labels, data
        assert len(found.labels) + len(found.broken) == 2, data
        assert (found.broken == []) == page_reads(data), data
        num_read += not found.broken
    assert 0 < num_read < MUTANTS
