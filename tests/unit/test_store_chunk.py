"""A chunk is read back exactly or refused: no flipped bit, no missing byte and no value that means
nothing gets through."""

import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import xxhash

from helpers.chunks import arrays_of, make_chunk, small_recipe, with_arrays
from stillhouse.errors import ChunkError
from stillhouse.logits import CompressedLogits, TargetSpec, decode, encode
from stillhouse.sequence import Sequences
from stillhouse.store import Chunk, Recipe, pack_chunk, unpack_chunk
from stillhouse.store.chunk_header import MAX_HEADER_BYTES, checksum_of

ROOT = Path(__file__).parents[2]
OF_FORMAT_2 = {
    "draw_logprobs_TN": "draw_logprobs",
    "label_logprob_T": "label_logprob",
    "tail_entropy_T": "tail_entropy",
}
RECIPE = small_recipe()
CHUNK = make_chunk(RECIPE, 1)
DATA = pack_chunk(CHUNK, RECIPE)


def assert_same(found: Chunk, wanted: Chunk) -> None:
    assert found.number == wanted.number
    for mine, theirs in zip(arrays_of(found).values(), arrays_of(wanted).values(), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def header_of(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header


def regions(data: bytes) -> dict[str, int]:
    """The middle of every region of the file: its length field, header and checksum, and each
    tensor."""
    header = header_of(data)
    base = 8 + struct.unpack("<Q", data[:8])[0]
    offsets = {
        name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"
    }
    places = {name: base + (first + last) // 2 for name, (first, last) in offsets.items()}
    places |= {f"first byte of {name}": base + first for name, (first, last) in offsets.items()}
    places |= {f"last byte of {name}": base + last - 1 for name, (first, last) in offsets.items()}
    return places | {
        "header length": 0,
        "header length, high": 7,
        "header": 40,
        "header padding": base - 1,
        "fingerprint": data.index(b"fingerprint") + 20,
        "chunk number": data.index(b'chunk\\":') + 8,
        "checksum": data.index(b"xxh3\\") + 10,
        "an offset": data.index(b"data_offsets") + 15,
    }


def sealed(data: bytes) -> bytes:
    """The file with a checksum that fits, as a writer with a defect would publish it."""
    header_bytes = struct.unpack("<Q", data[:8])[0]
    rows = header_of(data)["row_xxh3"]["shape"][0]
    at = data.index(b'\\"xxh3\\":\\"') + 11
    blank = data[:at] + b"0" * 16 + data[at + 16 :]
    return (
        data[:at]
        + xxhash.xxh3_64_hexdigest(blank[: 8 + header_bytes + 16 * rows + 8]).encode()
        + data[at + 16 :]
    )


def with_header(header: dict[str, Any], data: bytes = DATA) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        small_recipe(num_draws=3, value_bits=6),
        small_recipe(k=0, num_draws=5, temperature=0.5),
        small_recipe(chunk_sequences=1),
    ],
)
def test_a_chunk_is_read_back_exactly(recipe: Recipe) -> None:
    chunk = make_chunk(recipe, recipe.num_chunks - 1)
    assert_same(unpack_chunk(pack_chunk(chunk, recipe), recipe, chunk.number), chunk)


def test_a_chunk_without_a_single_target_is_read_back() -> None:
    chunk = with_arrays(
        CHUNK,
        loss_mask_SL=np.zeros_like(CHUNK.sequences.loss_mask_SL),
        targets_NB=CHUNK.targets_NB[:0],
    )
    assert_same(unpack_chunk(pack_chunk(chunk, RECIPE), RECIPE, 1), chunk)


def test_the_same_values_are_the_same_bytes() -> None:
    strided = with_arrays(
        CHUNK,
        token_ids_SL=np.asfortranarray(CHUNK.sequences.token_ids_SL),
        targets_NB=np.repeat(CHUNK.targets_NB, 2, axis=0)[::2],
    )
    assert pack_chunk(strided, RECIPE) == DATA


def test_any_safetensors_reader_opens_a_chunk() -> None:
    tensors = safetensors.numpy.load(DATA)
    np.testing.assert_array_equal(tensors["token_ids"], CHUNK.sequences.token_ids_SL)
    np.testing.assert_array_equal(tensors["row_starts"], CHUNK.row_starts)
    np.testing.assert_array_equal(tensors["targets"], CHUNK.targets_NB)


def test_arrays_that_were_read_can_be_written_to() -> None:
    chunk = unpack_chunk(DATA, RECIPE, 1)
    assert all(array.flags.writeable for array in (*chunk.sequences.arrays, chunk.targets_NB))


def test_a_row_of_a_chunk_is_a_chunk_of_one_row() -> None:
    row = CHUNK.row(2)
    np.testing.assert_array_equal(row.sequences.token_ids_SL, CHUNK.sequences.token_ids_SL[2:3])
    np.testing.assert_array_equal(
        row.targets_NB, CHUNK.targets_NB[CHUNK.row_starts[2] : CHUNK.row_starts[3]]
    )
    assert row.row_starts.tolist() == [0, len(row.targets_NB)]


@pytest.mark.parametrize("region", regions(DATA))
def test_a_flipped_bit_is_found_in_every_region(region: str) -> None:
    place = regions(DATA)[region]
    for bit in range(8):
        damaged = bytearray(DATA)
        damaged[place] ^= 1 << bit
        with pytest.raises(ChunkError, match="chunk 1"):
            unpack_chunk(bytes(damaged), RECIPE, 1)


def test_a_flipped_bit_is_found_in_every_byte() -> None:
    for place in range(len(DATA)):
        damaged = bytearray(DATA)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(ChunkError):
            unpack_chunk(bytes(damaged), RECIPE, 1)


def test_every_truncation_and_every_addition_is_found() -> None:
    for length in range(len(DATA)):
        with pytest.raises(ChunkError, match="chunk 1"):
            unpack_chunk(DATA[:length], RECIPE, 1)
    with pytest.raises(ChunkError, match="cut short or added to"):
        unpack_chunk(DATA + b"\0", RECIPE, 1)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_an_absurd_header_length_is_refused_before_anything_is_allocated(length: int) -> None:
    with pytest.raises(ChunkError, match=f"claims a header of {length} bytes"):
        unpack_chunk(struct.pack("<Q", length) + DATA[8:], RECIPE, 1)


@pytest.mark.parametrize(
    "text",
    [b"[" * 8000, b"null", b"{" + b" " * 40, b'{"__metadata__":7}', b"\xff" * 64, b"1" * 8000],
)
def test_a_header_that_is_not_one_is_refused(text: bytes) -> None:
    with pytest.raises(ChunkError, match="chunk 1"):
        unpack_chunk(struct.pack("<Q", len(text)) + text + DATA, RECIPE, 1)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("chunk", 2, "chunk 2, wanted 1"),
        ("codec", "zip", "codec 'zip', wanted 'ef-sqrt8'"),
        ("codec_version", 2, "codec_version 2, wanted 1"),
        ("fingerprint", "0" * 64, "fingerprint '0000"),
        ("format", 2, "format 2, wanted 1"),
        ("k", 5, "k 5, wanted 4"),
        ("vocab_size", None, "vocab_size None, wanted 300"),
        ("surprise", 1, "surprise 1, wanted None"),
    ],
)
def test_metadata_of_another_recipe_is_refused_saying_which_field(
    key: str, value: object, complaint: str
) -> None:
    header = header_of(DATA)
    metadata = json.loads(header["__metadata__"]["stillhouse"])
    header["__metadata__"]["stillhouse"] = json.dumps(
        {**metadata, key: value}, sort_keys=True, separators=(",", ":")
    )
    with pytest.raises(ChunkError, match=complaint):
        unpack_chunk(sealed(with_header(header)), RECIPE, 1)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("token_ids", {"dtype": "I64"}, "the tensor token_ids"),
        ("positions", {"shape": [4, 11]}, "the tensor positions"),
        ("loss_mask", {"data_offsets": [0, 48]}, "the tensor loss_mask"),
        ("targets", {"shape": [10**9, 13]}, "wanted a shape of 0 to 44 records"),
        ("targets", {"shape": [-1, 13]}, "wanted a shape of 0 to 44 records"),
        ("targets", {"shape": "many"}, "wanted a shape"),
        ("extra", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "the tensor extra"),
    ],
)
def test_a_tensor_out_of_its_place_is_refused(
    name: str, change: dict[str, Any], complaint: str
) -> None:
    header = header_of(DATA)
    header[name] = {**header.get(name, {}), **change}
    with pytest.raises(ChunkError, match=complaint):
        unpack_chunk(sealed(with_header(header)), RECIPE, 1)


def test_a_second_metadata_key_or_checksum_is_refused() -> None:
    header = header_of(DATA)
    header["__metadata__"]["another"] = "key"
    with pytest.raises(ChunkError, match="wanted one key"):
        unpack_chunk(sealed(with_header(header)), RECIPE, 1)
    doubled = DATA.replace(b'{\\"chunk\\"', b'{\\"xxh3\\":\\"0000000000000000\\",\\"chunk\\"')
    doubled = (
        struct.pack("<Q", struct.unpack("<Q", DATA[:8])[0] + len(doubled) - len(DATA)) + doubled[8:]
    )
    with pytest.raises(ChunkError, match="2 checksums"):
        unpack_chunk(doubled, RECIPE, 1)


def test_a_chunk_under_another_number_or_recipe_is_refused() -> None:
    with pytest.raises(ChunkError, match="chunk 0 has chunk 1, wanted 0"):
        unpack_chunk(DATA, RECIPE, 0)
    with pytest.raises(ChunkError, match="of another recipe"):
        unpack_chunk(DATA, small_recipe(teacher_digest="sha256:other"), 1)


def test_row_starts_that_divide_the_records_wrongly_are_refused() -> None:
    place = 8 + struct.unpack("<Q", DATA[:8])[0] + 8 * 4
    for starts in (
        [1, 2, 3, 4, len(CHUNK.targets_NB)],
        [0, 9, 8, 20, len(CHUNK.targets_NB)],
        [0, 1, 2, 3, 4],
        [0, 0, 0, 0, 44],
    ):
        damaged = DATA[:place] + np.array(starts, "<i8").tobytes() + DATA[place + 8 * 5 :]
        with pytest.raises(ChunkError, match="row_starts"):
            unpack_chunk(sealed(damaged), RECIPE, 1)


def changed(field: str, place: tuple[int, int], value: int) -> Chunk:
    array = getattr(CHUNK.sequences, field).copy()
    array[place] = value
    return with_arrays(CHUNK, **{field: array})


@pytest.mark.parametrize(
    ("chunk", "complaint"),
    [
        (changed("token_ids_SL", (0, 0), 300), "token ids from .* to 300, wanted 0 to 299"),
        (changed("token_ids_SL", (3, 5), -1), "token ids from -1"),
        (changed("positions_SL", (1, 0), 1), "positions that neither count up nor restart"),
        (changed("positions_SL", (1, 5), 11), "positions that neither count up nor restart"),
        (
            with_arrays(CHUNK, token_ids_SL=CHUNK.sequences.token_ids_SL.astype(np.int64)),
            "token_ids of int64 .4, 12., wanted int32 .4, 12.",
        ),
        (
            with_arrays(CHUNK, token_ids_SL=CHUNK.sequences.token_ids_SL[:3]),
            "token_ids of int32 .3, 12., wanted int32 .4, 12.",
        ),
        (replace(CHUNK, targets_NB=CHUNK.targets_NB[:-1]), "targets of uint8"),
        (replace(CHUNK, targets_NB=CHUNK.targets_NB[:, :-1]), "targets of uint8"),
        (replace(CHUNK, number=2), "wanted int32 .2, 12."),
    ],
)
def test_a_chunk_that_is_not_of_the_recipe_is_not_packed(chunk: Chunk, complaint: str) -> None:
    with pytest.raises(ChunkError, match=complaint):
        pack_chunk(chunk, RECIPE)


def test_a_mask_at_the_last_column_or_across_documents_is_not_packed() -> None:
    mask = np.zeros_like(CHUNK.sequences.loss_mask_SL)
    mask[0, -1] = 1
    with pytest.raises(ChunkError, match="last column"):
        pack_chunk(with_arrays(CHUNK, loss_mask_SL=mask, targets_NB=CHUNK.targets_NB[:1]), RECIPE)
    mask = np.zeros_like(CHUNK.sequences.loss_mask_SL)
    mask[0, 0] = 2
    with pytest.raises(ChunkError, match="not 0 or 1"):
        pack_chunk(with_arrays(CHUNK, loss_mask_SL=mask, targets_NB=CHUNK.targets_NB[:2]), RECIPE)
    row, column = np.argwhere(CHUNK.sequences.positions_SL[:, 1:] == 0)[0]
    mask = np.zeros_like(CHUNK.sequences.loss_mask_SL)
    mask[row, column] = 1
    with pytest.raises(ChunkError, match="last token of a document"):
        pack_chunk(with_arrays(CHUNK, loss_mask_SL=mask, targets_NB=CHUNK.targets_NB[:1]), RECIPE)


def test_the_checksum_is_the_one_in_the_file() -> None:
    assert checksum_of(DATA) == json.loads(header_of(DATA)["__metadata__"]["stillhouse"])["xxh3"]
    assert len(checksum_of(DATA)) == 16


@pytest.mark.parametrize("name", ["chunk_v1_top3", "chunk_v1_draws", "chunk_v2_weighted"])
def test_the_golden_chunks_are_written_to_the_byte_and_read_to_the_value(name: str) -> None:
    golden = json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text())
    data = (ROOT / "tests" / "golden" / f"{name}.safetensors").read_bytes()
    recipe, targets = Recipe(**{"format": 1, **golden["recipe"]}), golden["targets"]
    tails = [
        -math.inf if target["tail_logmass"] is None else target["tail_logmass"]
        for target in targets
    ]
    more: dict[str, Any] = {
        field: torch.tensor([target[name] for target in targets])
        for field, name in OF_FORMAT_2.items()
        if name in targets[0]
    }
    wanted = CompressedLogits(
        torch.tensor([target["ids"] for target in targets], dtype=torch.int32),
        torch.tensor([target["logprobs"] for target in targets], dtype=torch.float32),
        torch.tensor(tails, dtype=torch.float32),
        torch.tensor([target["draws"] for target in targets], dtype=torch.int32).reshape(
            len(targets), recipe.num_draws
        ),
        vocab_size=recipe.vocab_size,
        temperature=recipe.temperature,
        **more,
    )
    chunk = Chunk(
        golden["number"],
        Sequences(
            np.array(golden["token_ids"], np.int32),
            np.array(golden["positions"], np.int32),
            np.array(golden["loss_mask"], np.uint8),
        ),
        encode(wanted, recipe.spec).numpy(),
    )
    assert pack_chunk(chunk, recipe) == data
    found = unpack_chunk(data, recipe, golden["number"])
    assert_same(found, chunk)
    decoded = decode(torch.from_numpy(found.targets_NB), recipe.spec)
    assert torch.equal(decoded.token_ids_TK, wanted.token_ids_TK)
    assert torch.equal(decoded.tail_ids_TN, wanted.tail_ids_TN)
    for field, tensor in wanted.tensors.items():
        torch.testing.assert_close(decoded.tensors[field], tensor, rtol=0, atol=1e-6)


def test_a_weighted_target_keeps_its_probabilities_and_the_default_has_at_most_100_bytes() -> None:
    spec = TargetSpec(151_936, 8, num_draws=24, weighted=True)
    assert spec.bytes_per_token <= 100
    logprobs_TV = torch.linspace(3, -30, 400).log_softmax(0).expand(2, 400)
    draws_TN = torch.tensor([[4, 40, 399], [5, 5, 80]], dtype=torch.int32)
    wanted_TN = logprobs_TV.gather(1, draws_TN.long())
    wanted_TN[0, 2] = -torch.inf
    spec = TargetSpec(400, 4, num_draws=3, weighted=True)
    target = CompressedLogits(
        torch.arange(4, dtype=torch.int32).expand(2, 4).contiguous(),
        logprobs_TV[:, :4].contiguous(),
        (1 - logprobs_TV[:, :4].exp().sum(1)).log(),
        draws_TN,
        400,
        draw_logprobs_TN=wanted_TN,
    )
    found_TN = decode(encode(target, spec), spec).tensors["draw_logprobs_TN"]
    torch.testing.assert_close(
        found_TN[wanted_TN > -1e9], wanted_TN[wanted_TN > -1e9], rtol=0, atol=0.11
    )
    assert found_TN[0, 2] < -40


def test_the_sizes_on_the_format_page_are_the_codecs() -> None:
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| (\d+) \| (\d+) \| ([68]) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE
    )
    assert len(lines) == 10
    for line in lines:
        k, num_draws, value_bits, *sizes = (int(number) for number in line)
        specs = [
            TargetSpec(v, k, num_draws=num_draws, value_bits=value_bits)
            for v in (32_000, 128_256, 151_936, 262_144)
        ]
        assert [spec.bytes_per_token for spec in specs] == sizes
