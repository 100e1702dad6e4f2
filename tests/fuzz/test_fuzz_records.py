"""Whatever bytes a record has, it is what its own target encodes to, on the processor as on a
device, or it is refused with ChunkError."""

import random
from functools import partial

import numpy as np
import pytest
import torch

from helpers.bounded import bounded
from helpers.chunks import make_records
from helpers.mutants import mutated_bytes
from helpers.pagereader import read_record
from stillhouse.errors import ChunkError
from stillhouse.logits import CompressedLogits, TargetSpec, codec_torch, decode, encode

SPECS = {
    "kept": TargetSpec(300, 4),
    "six bits": TargetSpec(1000, 7, value_bits=6),
    "one": TargetSpec(50, 1),
    "draws": TargetSpec(300, 3, num_draws=5),
    "draws alone": TargetSpec(17, 0, num_draws=9),
    "the whole vocabulary": TargetSpec(9, 9, value_bits=6),
    "more draws than tokens": TargetSpec(6, 2, num_draws=20),
    "weighted draws": TargetSpec(30, 3, num_draws=4, weighted=True),
    "all that there is": TargetSpec(
        6, 1, num_draws=5, weighted=True, label_logprob=True, tail_entropy=True
    ),
    "weighted draws and label": TargetSpec(17, 0, num_draws=4, weighted=True, label_logprob=True),
}
MUTANTS = 250
BYTES = (0, 1, 2, 0x3C, 0x51, 0x7C, 0x7E, 0x80, 0xFC, 0xFF)


def mutant(rng: random.Random, record: bytes, spec: TargetSpec) -> bytes:
    """A record of the same size: flipped, overwritten, of random bytes, or with the numbers of its
    header replaced."""
    match rng.randrange(4):
        case 0:
            changed = rng.randbytes(len(record))
        case 1:
            changed = bytes(rng.choice(BYTES) if rng.random() < 0.15 else byte for byte in record)
        case 2 if spec.k:
            numbers = [
                rng.choice(
                    (
                        1.0,
                        40.0,
                        0.999,
                        40.03,
                        5.0,
                        -1.0,
                        0.0,
                        -6e-8,
                        -65504.0,
                        np.inf,
                        -np.inf,
                        np.nan,
                    )
                )
                for _ in range(2)
            ]
            changed = np.array(numbers, "<f2").tobytes() + record[4:]
        case _:
            changed = mutated_bytes(rng, record)
    return changed.ljust(len(record), b"\0")[: len(record)]


def page_reads(record: bytes, spec: TargetSpec) -> bool:
    recipe = {
        "k": spec.k,
        "num_draws": spec.num_draws,
        "vocab_size": spec.vocab_size,
        "value_bits": spec.value_bits,
        "draws": "weighted" if spec.weighted else "ids",
        "label_logprob": 2 if spec.label_logprob else 0,
        "tail_entropy": 2 if spec.tail_entropy else 0,
    }
    try:
        read_record(record, recipe)
    except Exception:  # it follows the page and takes no care of what else may go wrong
        return False
    return True


@pytest.mark.parametrize("name", SPECS)
def test_a_record_is_its_targets_own_or_is_refused_with_chunk_error(
    rng: random.Random, name: str
) -> None:
    spec = SPECS[name]
    whole_TB = make_records(spec, 8, np.random.default_rng(7))
    for _ in range(MUTANTS):
        record = mutant(rng, bytes(rng.choice([*whole_TB])), spec)
        records_TB = torch.frombuffer(bytearray(record), dtype=torch.uint8).reshape(1, -1)
        found = bounded(
            partial(decode, records_TB, spec),
            num_bytes=len(record),
            refusal=ChunkError,
        )
        on_device = bounded(
            partial(codec_torch.decode, records_TB, spec),
            num_bytes=len(record),
            refusal=ChunkError,
        )
        assert (found is not None) == (on_device is not None) == page_reads(record, spec), (
            record.hex()
        )
        if found is not None and on_device is not None:
            assert encode(found, spec).numpy().tobytes() == record, record.hex()
            assert same_ids(found, on_device), record.hex()


def same_ids(one: CompressedLogits, other: CompressedLogits) -> bool:
    return torch.equal(one.token_ids_TK, other.token_ids_TK) and torch.equal(
        one.tail_ids_TN, other.tail_ids_TN
    )


def test_of_many_records_the_first_bad_one_is_named(rng: random.Random) -> None:
    spec = SPECS["draws"]
    whole_TB = make_records(spec, 40, np.random.default_rng(7))
    for _ in range(MUTANTS // 2):
        records_TB = whole_TB.copy()
        for row in rng.sample(range(40), rng.randrange(4)):
            records_TB[row] = np.frombuffer(mutant(rng, bytes(records_TB[row]), spec), "u1")
        bad = [row for row in range(40) if not page_reads(bytes(records_TB[row]), spec)]
        found = refusal_of(records_TB, spec)
        assert found.startswith(f"the record of row {bad[0]} ") if bad else not found


def refusal_of(records_TB: np.ndarray, spec: TargetSpec) -> str:
    try:
        decode(torch.from_numpy(records_TB), spec)
    except ChunkError as error:
        return str(error)
    return ""
