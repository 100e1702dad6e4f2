"""Golden records of format 2: both libraries write these bytes, and they and the reader that was
written from the page alone read the same values from them."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from helpers.pagereader import read_record
from stillhouse.logits import CompressedLogits, TargetSpec, codec_numpy, codec_torch

GOLDEN = Path(__file__).parents[1] / "golden" / "codec_v2.hex"
LOG2 = math.log(2.0)
FIELDS = {  # by the names of the page's reader
    "ids": "token_ids_TK",
    "logprobs": "logprobs_TK",
    "tail_logmass": "tail_logmass_T",
    "draws": "tail_ids_TN",
    "draw_logprobs": "draw_logprobs_TN",
    "label_logprob": "label_logprob_T",
    "tail_entropy": "tail_entropy_T",
}

Values = dict[str, Any]  # of one record, as the page's reader gives them


class Case(NamedTuple):
    """The target of one token, and what its record holds of it."""

    spec: TargetSpec
    exact: Values
    stored: Values  # where it differs


CASES = {
    "weighted_draws": Case(
        TargetSpec(1000, 4, num_draws=3, weighted=True),
        {
            "ids": [17, 999, 3, 500],
            "logprobs": [-LOG2, -2 * LOG2, -3 * LOG2, -4 * LOG2],
            "tail_logmass": -4 * LOG2,
            "draws": [4, 4, 640],
            "draw_logprobs": [-5.5, -5.5, -9.25],
        },
        {
            "logprobs": [-0.692483, -1.387703, -2.078875, -2.772561],
            "tail_logmass": -2.773438,
            "draw_logprobs": [-5.506359, -5.506359, -9.266332],
        },
    ),
    "six_bits_with_all_that_there_is": Case(
        TargetSpec(
            1000,
            3,
            num_draws=5,
            value_bits=6,
            weighted=True,
            label_logprob=True,
            tail_entropy=True,
        ),
        {
            "ids": [512, 0, 511],
            "logprobs": [-0.25, -2.0, -9.0],
            "tail_logmass": -2.455,
            "draws": [1, 1, 640, 998, 999],
            "draw_logprobs": [-9.5, -9.5, -10.25, -12.0, -31.0],
            "label_logprob": -2.0,
            "tail_entropy": 4.625,
        },
        {
            "logprobs": [-0.242649, -2.044286, -8.992649],
            "tail_logmass": -2.455078,
            "draw_logprobs": [-9.513126, -9.513126, -10.268310, -11.976146, -30.963402],
        },
    ),
    "blind_draws_with_label_and_entropy": Case(
        TargetSpec(1000, 3, num_draws=2, label_logprob=True, tail_entropy=True),
        {
            "ids": [512, 0, 511],
            "logprobs": [-0.25, -2.0, -9.0],
            "tail_logmass": -2.455,
            "draws": [7, 900],
            "label_logprob": -11.5,
            "tail_entropy": 5.5,
        },
        {"logprobs": [-0.250497, -1.997998, -9.000497], "tail_logmass": -2.455078},
    ),
    "weighted_draws_alone_one_of_them_impossible": Case(
        TargetSpec(7, 0, num_draws=5, weighted=True, label_logprob=True),
        {
            "ids": [],
            "logprobs": [],
            "tail_logmass": 0.0,
            "draws": [0, 1, 1, 5, 6],
            "draw_logprobs": [-0.75, -2.5, -2.5, -6.0, -math.inf],
            "label_logprob": -0.75,
        },
        {"draw_logprobs": [-0.736678, -2.492180, -2.492180, -6.036925, -40.0]},
    ),
    "whole_vocabulary_with_an_impossible_label": Case(
        TargetSpec(3, 3, label_logprob=True),
        {
            "ids": [0, 2, 1],
            "logprobs": [-LOG2, -LOG2, -math.inf],
            "tail_logmass": -math.inf,
            "draws": [],
            "label_logprob": -math.inf,
        },
        {"logprobs": [-LOG2, -LOG2, -LOG2 - 40], "label_logprob": -65504.0},
    ),
    "a_tail_without_mass_and_a_certain_label": Case(
        TargetSpec(50, 2, label_logprob=True, tail_entropy=True),
        {
            "ids": [4, 9],
            "logprobs": [0.0, -21.0],
            "tail_logmass": -math.inf,
            "draws": [],
            "label_logprob": 0.0,
            "tail_entropy": 0.0,
        },
        {"label_logprob": -(2.0**-24)},
    ),
}


def golden_records() -> dict[str, bytes]:
    return {
        name: bytes.fromhex(record)
        for name, record in (line.split() for line in GOLDEN.read_text().splitlines())
    }


@pytest.mark.parametrize("library", [codec_numpy, codec_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_golden_bytes_of_format_2_are_written_and_read_for_ever(
    name: str, library: ModuleType
) -> None:
    spec, exact, stored = CASES[name]
    golden = golden_records()[name]
    assert library.encode(target_of(exact, spec), spec).numpy().tobytes() == golden
    decoded = library.decode(torch.tensor([list(golden)], dtype=torch.uint8), spec)
    assert library.encode(decoded, spec).numpy().tobytes() == golden
    for found in (values_of(decoded), page_reads(golden, spec)):
        assert found.keys() == exact.keys()
        for key, wanted in {**exact, **stored}.items():
            assert found[key] == pytest.approx(wanted, rel=0.0, abs=2e-6), key


def test_every_golden_record_of_format_2_is_tested() -> None:
    assert golden_records().keys() == CASES.keys()


def target_of(values: Values, spec: TargetSpec) -> CompressedLogits:
    tensors: dict[str, Any] = {
        FIELDS[key]: torch.tensor(
            [value], dtype=torch.int32 if key in ("ids", "draws") else torch.float32
        )
        for key, value in values.items()
    }
    return CompressedLogits(**tensors, vocab_size=spec.vocab_size)


def values_of(target: CompressedLogits) -> Values:
    tensors = target.tensors
    return {key: tensors[name][0].tolist() for key, name in FIELDS.items() if name in tensors}


def page_reads(record: bytes, spec: TargetSpec) -> Values:
    recipe = {
        "k": spec.k,
        "num_draws": spec.num_draws,
        "vocab_size": spec.vocab_size,
        "value_bits": spec.value_bits,
        "draws": "weighted" if spec.weighted else "ids",
        "label_logprob": 2 if spec.label_logprob else 0,
        "tail_entropy": 2 if spec.tail_entropy else 0,
    }
    return read_record(record, recipe)
