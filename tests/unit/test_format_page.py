"""docs/format.md is enough to read a store: `helpers.pagereader` was written from that page, and
nothing here imports stillhouse."""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.pagereader import (
    Refused,
    read_chunk,
    read_index,
    read_record,
    recipe_json,
    record_bytes,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
GOLDEN = ROOT / "tests" / "golden"
NAMES = ["chunk_v1_top3", "chunk_v1_draws", "chunk_v2_weighted"]


def golden(name: str) -> tuple[bytes, dict[str, Any], dict[str, Any], str]:
    """The file, what it holds, its recipe and its fingerprint."""
    wanted = json.loads((GOLDEN / f"{name}.json").read_text())
    recipe = recipe_json(wanted["recipe"])
    return (
        (GOLDEN / f"{name}.safetensors").read_bytes(),
        wanted,
        json.loads(recipe),
        hashlib.sha256(recipe).hexdigest(),
    )


def block_after(words: str) -> str:
    """The code block that follows these words on the page."""
    found = re.search(re.escape(words) + r".*?```\w*\n(.*?)\n```", PAGE, re.DOTALL)
    assert found is not None, words
    return found[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_written_from_the_page_reads_the_golden_chunk(name: str) -> None:
    data, wanted, recipe, fingerprint = golden(name)
    found = read_chunk(data, recipe, fingerprint, wanted["number"])
    assert [found[key] for key in ("token_ids", "positions", "loss_mask")] == [
        wanted[key] for key in ("token_ids", "positions", "loss_mask")
    ]
    assert [(t["ids"], t["draws"]) for t in found["targets"]] == [
        (t["ids"], t["draws"]) for t in wanted["targets"]
    ]
    for mine, theirs in zip(found["targets"], wanted["targets"], strict=True):
        assert mine["tail_logmass"] == (
            -math.inf if theirs["tail_logmass"] is None else theirs["tail_logmass"]
        )
        assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-6)
        kept = sum(math.exp(logprob) for logprob in mine["logprobs"])
        assert kept + math.exp(mine["tail_logmass"]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_obliges_a_reader_to_verify_finds_every_flipped_bit_and_every_cut(
    name: str,
) -> None:
    data, wanted, recipe, fingerprint = golden(name)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(Refused):
            read_chunk(bytes(damaged), recipe, fingerprint, wanted["number"])
        with pytest.raises(Refused):
            read_chunk(data[:place], recipe, fingerprint, wanted["number"])


@pytest.mark.parametrize(
    "change",
    [
        lambda record: b"\x00\x3b" + record[2:],
        lambda record: b"\x00\x52" + record[2:],
        lambda record: record[:2] + b"\x00\x00" + record[4:],
        lambda record: record[:2] + b"\x00\x7e" + record[4:],
        lambda record: record[:5] + b"\x1a" + record[6:],
        lambda record: record[:6] + b"\x8b" + record[7:],
        lambda record: record[:6] + b"\x0f" + record[7:],
        lambda record: record[:6] + b"\x70" + record[7:],
        lambda record: record[:7] + b"\xf1\x01\xff",
        lambda record: record[:7] + b"\xf1\x00\xfe",
    ],
)
def test_a_record_that_the_page_forbids_is_refused(change: Callable[[bytes], bytes]) -> None:
    _, _, recipe, _ = golden("chunk_v1_top3")
    record = bytes.fromhex("2a 44 32 c4 90 0a 0b f1 00 ff")
    read_record(record, recipe)
    with pytest.raises(Refused):
        read_record(change(record), recipe)


def test_the_worked_example_is_the_golden_chunk() -> None:
    data, _, recipe, fingerprint = golden("chunk_v1_top3")
    text = block_after("bytes of `recipe.json`:").encode("ascii")
    assert json.loads(text) == recipe
    assert f"the {len(text)} bytes of `recipe.json`" in PAGE
    assert hashlib.sha256(text).hexdigest() == block_after("Its fingerprint") == fingerprint
    header = block_after("The header, to be padded with").encode("ascii")
    header += b" " * (-len(header) % 8)
    body = "".join(line[4:] for line in block_after("After the header come:").splitlines())
    assert struct.pack("<Q", len(header)) + header + bytes.fromhex(body) == data
    assert f"`{data[:8].hex(' ')}`, H = {len(header)}" in PAGE
    assert f"{len(data)} bytes" in PAGE


def test_the_first_record_of_the_worked_example_is_the_one_decoded_there() -> None:
    data, wanted, recipe, fingerprint = golden("chunk_v1_top3")
    tensors, _ = read_index(data, recipe, fingerprint, wanted["number"])
    assert (
        f"`{tensors['targets'][0].tobytes().hex(' ')}`, is the distribution after the token 7"
        in PAGE
    )
    told = re.search(
        r"id (\d+) with log-probability (\S+), id (\d+) with (\S+), id (\d+) with (\S+), and the "
        r"others with (\S+) together",
        PAGE,
    )
    assert told is not None
    first = wanted["targets"][0]
    assert [int(told[i]) for i in (1, 3, 5)] == first["ids"]
    assert [float(told[i]) for i in (2, 4, 6, 7)] == pytest.approx(
        [*first["logprobs"], first["tail_logmass"]], abs=1e-6
    )


def test_the_sizes_are_those_of_the_pages_own_formula() -> None:
    lines = re.findall(
        r"^\| (\d+) \| (\d+) \| ([68]) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE
    )
    assert len(lines) == 10
    for line in lines:
        k, num_draws, value_bits, *sizes = (int(number) for number in line)
        recipe = {"k": k, "num_draws": num_draws, "value_bits": value_bits}
        assert [
            record_bytes({**recipe, "vocab_size": v}) for v in (32_000, 128_256, 151_936, 262_144)
        ] == sizes
