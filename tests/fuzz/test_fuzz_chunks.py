"""Whatever a file says that it is, a chunk is read exactly where docs/format.md allows it, and
refused with ChunkError elsewhere.

The mutants' checksums and hashes are made right again, so that every rule below them is reached.
"""

import json
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from helpers.bounded import bounded
from helpers.chunks import arrays_of, make_chunk, small_recipe
from helpers.mutants import dumps, mutated_bytes, mutated_json
from helpers.pagereader import read_chunk
from helpers.sealing import Arrays, canonical, chunk_file, header_of, metadata_of, sealed_chunk
from stillhouse.errors import ChunkError
from stillhouse.logits import decode
from stillhouse.store import Recipe
from stillhouse.store.chunk import (
    Chunk,
    index_bytes,
    pack_chunk,
    parse_index,
    unpack_chunk,
    unpack_rows,
)
from stillhouse.store.chunk_header import is_whole

SHAPE: dict[str, Any] = {
    "num_sequences": 5,
    "sequence_length": 6,
    "chunk_sequences": 3,
    "vocab_size": 40,
}
CASES = {
    "kept": (small_recipe(**SHAPE, k=3), 0),
    "six bits and draws": (small_recipe(**SHAPE, k=5, num_draws=3, value_bits=6), 1),
    "draws alone": (small_recipe(**SHAPE, k=0, num_draws=4, temperature=2.5), 0),
    "the whole vocabulary": (small_recipe(**{**SHAPE, "vocab_size": 5}, k=5), 1),
    "format 2": (small_recipe(**SHAPE, k=2, num_draws=3, format=2), 0),
    "all that a record may have": (
        small_recipe(
            **SHAPE,
            k=2,
            num_draws=3,
            weighted=True,
            label_logprob=True,
            tail_entropy=True,
            format=2,
        ),
        1,
    ),
}
MUTANTS = 300
STRANGE = (0, 1, -1, 2, 3, 5, 6, 39, 40, 41, 255, 2**31 - 1, -(2**31), 2**62, -(2**63))


def mutant(rng: random.Random, chunk: Chunk, recipe: Recipe) -> bytes:
    """A file that differs in its bytes, its header, its metadata, its arrays or the number of its
    records."""
    arrays, values = arrays_of(chunk), page_recipe(recipe)
    metadata = canonical(metadata_of(values, chunk.number))
    header = dumps(header_of(arrays, metadata), separators=(",", ":"))
    match rng.randrange(6):
        case 0:
            return mutated_bytes(rng, pack_chunk(chunk, recipe))
        case 1:
            return chunk_file(
                arrays, dumps(mutated_json(rng, header_of(arrays, metadata)), separators=(",", ":"))
            )
        case 2:
            changed = dumps(
                mutated_json(rng, metadata_of(values, chunk.number)),
                sort_keys=rng.random() < 0.5,
                separators=(",", ":"),
            )
            return chunk_file(arrays, dumps(header_of(arrays, changed), separators=(",", ":")))
        case 3:
            index_end = (
                8 + len(header) + -len(header) % 8 + 16 * len(chunk.sequences.token_ids_SL) + 8
            )
            data = chunk_file(arrays, header)
            whole = sealed_chunk(
                mutated_bytes(rng, data[:index_end]) + data[index_end:],
                num_rows=len(chunk.sequences.token_ids_SL),
            )
            return whole if len(whole) >= 8 else data
        case 4:
            name = rng.choice([*arrays])
            return chunk_file({**arrays, name: _with_strange_values(rng, arrays[name])}, header)
        case _:
            return _with_other_targets(rng, arrays, metadata)


def _with_strange_values(rng: random.Random, array: np.ndarray) -> np.ndarray:
    changed = array.copy().reshape(-1)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(changed.size)
        with np.errstate(over="ignore"):
            changed[at] = np.array(
                rng.choice(
                    (*STRANGE, int(changed[at]) + 1, int(changed[rng.randrange(changed.size)]))
                )
            ).astype(array.dtype)
    return changed.reshape(array.shape)


def _with_other_targets(rng: random.Random, arrays: Arrays, metadata: bytes) -> bytes:
    """The mask changed, and starts and records made to agree with it; or records changed; or one
    more than the rows have."""
    mask, records = arrays["loss_mask"].copy(), arrays["targets"]
    if rng.random() < 0.5:
        mask[rng.randrange(len(mask)), rng.randrange(mask.shape[1])] ^= rng.choice((1, 1, 1, 2, 3))
    count = int(mask.sum())
    targets = np.resize(records, (count, records.shape[1])).copy()
    if rng.random() < 0.7 and count:
        targets[rng.randrange(count)] = np.frombuffer(
            mutated_bytes(rng, bytes(records[0])).ljust(records.shape[1], b"\0"), "u1"
        )[: records.shape[1]]
    starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1, dtype=np.int64))])
    before, behind = rng.choice(((0, 0), (0, 0), (1, 0), (0, 1)))  # records of no row
    targets, starts = (
        np.pad(targets, ((before, behind), (0, 0)), mode="wrap" if count else "constant"),
        starts + before,
    )
    changed = {**arrays, "loss_mask": mask, "targets": targets, "row_starts": starts}
    return chunk_file(changed, dumps(header_of(changed, metadata), separators=(",", ":")))


def page_recipe(recipe: Recipe) -> dict[str, Any]:
    """As the page's reader takes it."""
    values: dict[str, Any] = json.loads(recipe.canonical_json())
    return values


def page_reads(data: bytes, recipe: Recipe, number: int) -> dict[str, Any] | None:
    """What the page's reader makes of it: None where it refuses."""
    try:
        return read_chunk(data, page_recipe(recipe), recipe.fingerprint, number)
    except Exception:  # it follows the page and takes no care of what else may go wrong
        return None


def read(data: bytes, recipe: Recipe, number: int) -> Chunk:
    chunk = unpack_chunk(data, recipe, number)
    decode(torch.from_numpy(chunk.targets_NB), recipe.spec)
    return chunk


@pytest.mark.parametrize("case", CASES)
def test_a_chunk_is_read_where_the_page_allows_it_and_refused_with_chunk_error_elsewhere(
    rng: random.Random, case: str
) -> None:
    recipe, number = CASES[case]
    whole = make_chunk(recipe, number)
    num_read = 0
    for _ in range(MUTANTS):
        data = mutant(rng, whole, recipe)
        found = bounded(
            partial(read, data, recipe, number), num_bytes=len(data), refusal=ChunkError
        )
        wanted = page_reads(data, recipe, number)
        assert (found is None) == (wanted is None), data.hex()
        look = partial(is_whole, data, num_bytes=len(data))
        assert isinstance(bounded(look, num_bytes=len(data)), bool)
        if found is not None and wanted is not None:
            num_read += 1
            assert found.sequences.token_ids_SL.tolist() == wanted["token_ids"], data.hex()
            assert found.sequences.positions_SL.tolist() == wanted["positions"], data.hex()
            assert found.sequences.loss_mask_SL.tolist() == wanted["loss_mask"], data.hex()
            assert (
                unpack_chunk(pack_chunk(found, recipe), recipe, number).targets_NB.tolist()
                == found.targets_NB.tolist()
            ), data.hex()
    assert num_read > 0  # some changes are none, or are allowed


@pytest.mark.parametrize("case", CASES)
def test_rows_are_read_as_they_were_written_or_refused_with_chunk_error(
    rng: random.Random, case: str
) -> None:
    """Pieces of a row are changed, cut short or exchanged."""
    recipe, number = CASES[case]
    data = pack_chunk(make_chunk(recipe, number), recipe)
    index = parse_index(data[: index_bytes(recipe, number)], recipe, number, num_bytes=len(data))
    for _ in range(MUTANTS // 2):
        row, at = rng.randrange(len(index.row_xxh3_S)), rng.randrange(4)
        whole = [data[start:end] for start, end in index.row_extents(row)]
        pieces = list(whole)
        pieces[at] = rng.choice(
            (mutated_bytes(rng, pieces[at]), pieces[at][:-1], pieces[rng.randrange(4)])
        )
        found = bounded(
            partial(unpack_rows, index, [row], [pieces]),
            num_bytes=len(data),
            refusal=ChunkError,
        )
        assert found is None or pieces == whole


@pytest.mark.parametrize("case", CASES)
def test_an_index_is_read_whole_or_refused_with_chunk_error_whatever_a_server_says_of_its_size(
    rng: random.Random, case: str
) -> None:
    """It is cut anywhere, and its checksum is right for what is left; the file is said to have any
    length."""
    recipe, number = CASES[case]
    data = pack_chunk(make_chunk(recipe, number), recipe)
    num_rows = len(recipe.chunk_rows(number))
    end = 8 + int.from_bytes(data[:8], "little") + 16 * num_rows + 8
    for _ in range(MUTANTS // 2):
        head = data[: rng.choice((end, rng.randrange(8, end), rng.randrange(end - 24, end)))]
        size = rng.choice(
            (0, 1, len(head), len(data), len(data), len(data) + 1, 2**62, rng.randrange(len(data)))
        )
        sealed = sealed_chunk(head, num_rows=num_rows)
        index = bounded(
            partial(parse_index, sealed, recipe, number, num_bytes=size),
            num_bytes=len(data),
            refusal=ChunkError,
        )
        assert (index is not None) == (len(head) == end and size == len(data)), (len(head), size)
