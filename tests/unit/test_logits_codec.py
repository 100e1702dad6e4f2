"""Records are what the codec's layout says, byte for byte; ids come back exactly, values within
half a step, damage is refused."""

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.targets import bucketed
from stillhouse.errors import ChunkError, ConfigError
from stillhouse.logits import (
    CompressedLogits,
    TargetSpec,
    codec_numpy,
    codec_torch,
    compress,
    concatenate,
    decode,
    encode,
    fidelity,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "codec_v1.hex"
in_both_libraries = pytest.mark.parametrize(
    "library", [codec_numpy, codec_torch], ids=["numpy", "torch"]
)


def target_of(logits: torch.Tensor, spec: TargetSpec, *, seed: int = 0) -> CompressedLogits:
    """The target of some logits, with draws (ascending, often repeated) from anywhere in the
    vocabulary."""
    c = bucketed(logits, spec.k, temperature=spec.temperature)
    draws = torch.randint(
        spec.vocab_size,
        (c.num_tokens, spec.num_draws),
        generator=torch.Generator().manual_seed(seed),
    ).sort(dim=1)
    return CompressedLogits(
        c.token_ids_TK,
        c.logprobs_TK,
        c.tail_logmass_T,
        draws.values.int(),
        vocab_size=c.vocab_size,
        temperature=c.temperature,
    )


def row_of(
    ids: list[int],
    logprobs: list[float],
    tail: float,
    *,
    vocab_size: int,
    draws: tuple[int, ...] = (),
) -> CompressedLogits:
    return CompressedLogits(
        torch.tensor([ids], dtype=torch.int32),
        torch.tensor([logprobs]),
        torch.tensor([tail]),
        torch.tensor([draws], dtype=torch.int32),
        vocab_size=vocab_size,
    )


def power_law_logits(num_tokens: int, vocab_size: int, *, exponent: float) -> torch.Tensor:
    """Logits -exponent * log(rank) + N(0, 1), each row in its own random order: a language model's
    long tail."""
    generator = torch.Generator().manual_seed(round(10 * exponent))
    ranked = -exponent * torch.arange(1, vocab_size + 1).log() + torch.randn(
        num_tokens, vocab_size, generator=generator
    )
    return torch.stack([row[torch.randperm(vocab_size, generator=generator)] for row in ranked])


def assert_equal(a: CompressedLogits, b: CompressedLogits) -> None:
    for name in ("token_ids_TK", "logprobs_TK", "tail_logmass_T", "tail_ids_TN"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.vocab_size, a.temperature) == (b.vocab_size, b.temperature)


# An encoder of one row, written from the layout alone
# -----------------------------------------------------------------------------------


def bit_stream(bits: list[int]) -> bytes:
    return sum(bit << i for i, bit in enumerate(bits)).to_bytes(-(-len(bits) // 8), "little")


def elias_fano(ids: list[int], vocab_size: int) -> bytes:
    low = max(0, math.floor(math.log2(vocab_size / len(ids))))
    high = [0] * (len(ids) + ((vocab_size - 1) >> low) + 1)
    for i, number in enumerate(ids):
        high[(number >> low) + i] = 1
    return bit_stream([number >> bit & 1 for number in ids for bit in range(low)]) + bit_stream(
        high
    )


def root(drop: np.float32) -> np.float32:
    return np.float32(np.sqrt(np.float32(1) + drop) - np.float32(1))


def token_of(c: CompressedLogits, row: int) -> CompressedLogits:
    return c.map(lambda tensor: tensor[row : row + 1])


def spelled_out(c: CompressedLogits, spec: TargetSpec) -> bytes:
    record = b""
    if spec.k:
        entries = sorted(zip(c.token_ids_TK[0].tolist(), c.logprobs_TK[0].numpy(), strict=True))
        best = max(logprob for _, logprob in entries)
        drops = [np.minimum(best - logprob, np.float32(40)) for _, logprob in entries]
        half_range = np.float16(max(*drops, np.float32(1)))
        tail = float(c.tail_logmass_T[0])
        half_tail = np.float16(tail if tail == -math.inf else min(max(tail, -65504), -(2**-24)))
        top = np.float32(2**spec.value_bits - 1)
        codes = [
            int(np.rint(top * np.minimum(root(d) / root(np.float32(half_range)), 1))) for d in drops
        ]
        record += np.array([half_range, half_tail], "<f2").tobytes() + elias_fano(
            [number for number, _ in entries], spec.vocab_size
        )
        record += bit_stream([code >> bit & 1 for code in codes for bit in range(spec.value_bits)])
    if spec.num_draws:
        record += elias_fano(c.tail_ids_TN[0].tolist(), spec.vocab_size)
    return record


@st.composite
def cases(draw: st.DrawFn) -> tuple[CompressedLogits, TargetSpec]:
    vocab_size = draw(st.one_of(st.integers(1, 40), st.integers(41, 5000)))
    k = draw(st.integers(0, min(vocab_size, 70)))
    spec = TargetSpec(
        vocab_size,
        k,
        num_draws=draw(st.integers(0 if k else 1, 60)) if k < vocab_size else 0,
        value_bits=draw(st.sampled_from([6, 8])),
        temperature=draw(st.sampled_from([1.0, 2.5])),
    )
    seed, num_tokens = draw(st.integers(0, 10**6)), draw(st.integers(0, 4))
    logits = draw(st.sampled_from([0.01, 1.0, 5.0, 30.0])) * torch.randn(
        num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed)
    )
    if draw(st.booleans()):
        logits = logits.round()
    if draw(st.booleans()):
        logits[:, 1::2] = -math.inf
    return target_of(logits, spec, seed=seed), spec


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_records_are_what_the_layout_spells_out(case: tuple[CompressedLogits, TargetSpec]) -> None:
    c, spec = case
    records = encode(c, spec)
    assert (records.dtype, records.shape) == (torch.uint8, (c.num_tokens, spec.bytes_per_token))
    for row, record in enumerate(records):
        assert record.numpy().tobytes() == spelled_out(token_of(c, row), spec)


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_ids_and_draws_come_back_exactly_in_canonical_order_and_encode_again_to_the_same_bytes(
    case: tuple[CompressedLogits, TargetSpec],
) -> None:
    c, spec = case
    records = encode(c, spec)
    decoded = decode(records, spec)
    assert torch.equal(decoded.token_ids_TK.sort(dim=1).values, c.token_ids_TK.sort(dim=1).values)
    assert torch.equal(decoded.tail_ids_TN, c.tail_ids_TN)
    steps, ids = decoded.logprobs_TK.diff(dim=1), decoded.token_ids_TK.diff(dim=1)
    assert ((steps < 0) | ((steps == 0) & (ids > 0))).all()
    assert (decoded.vocab_size, decoded.temperature) == (c.vocab_size, c.temperature)
    assert torch.equal(encode(decoded, spec), records)


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_values_come_back_within_half_a_step_and_keep_the_total_mass(
    case: tuple[CompressedLogits, TargetSpec],
) -> None:
    c, spec = case
    decoded = decode(encode(c, spec), spec)
    tail = c.tail_logmass_T.clamp(max=-(2.0**-24))
    torch.testing.assert_close(
        decoded.tail_logmass_T,
        tail if spec.k else torch.zeros_like(tail),
        rtol=2**-11,
        atol=2**-25,
    )
    if spec.k == 0:
        return
    mass = decoded.logprobs_TK.double().exp().sum(dim=1)
    torch.testing.assert_close(
        mass, -torch.expm1(decoded.tail_logmass_T.double()), rtol=1e-5, atol=0.0
    )
    order, decoded_order = c.token_ids_TK.argsort(dim=1), decoded.token_ids_TK.argsort(dim=1)
    exact = (
        (c.logprobs_TK.amax(dim=1, keepdim=True) - c.logprobs_TK)
        .gather(1, order)
        .clamp(max=40.0)
        .double()
    )
    stored = (decoded.logprobs_TK[:, :1] - decoded.logprobs_TK).gather(1, decoded_order).double()
    wide = exact.amax(dim=1, keepdim=True).clamp(min=1.0)
    half_step = ((1 + wide).sqrt() - 1) / (2 * (2**spec.value_bits - 1))
    allowed = 2 * half_step * (1 + exact).sqrt() + half_step**2 + wide * 2**-10 + 1e-5
    assert ((stored - exact).abs() <= allowed).all()


@given(case=cases(), place=st.integers(0, 10**6), flip=st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_a_damaged_record_is_refused_or_is_exactly_what_its_own_target_encodes_to(
    case: tuple[CompressedLogits, TargetSpec], place: int, flip: int
) -> None:
    c, spec = case
    records = encode(c, spec)
    if records.numel():
        records.view(-1)[place % records.numel()] ^= flip
    try:
        decoded = decode(records, spec)
    except ChunkError:
        return
    assert torch.equal(encode(decoded, spec), records)


@pytest.mark.parametrize(
    ("k", "num_draws", "value_bits", "size"),
    [
        (32, 0, 8, 93),
        (64, 0, 8, 174),
        (128, 0, 8, 327),
        (32, 0, 6, 85),
        (64, 0, 6, 158),
        (128, 0, 6, 295),
        (12, 12, 8, 64),
        (0, 50, 8, 85),
    ],
)
def test_records_have_the_promised_sizes(
    k: int, num_draws: int, value_bits: int, size: int
) -> None:
    spec = TargetSpec(151_936, k, num_draws=num_draws, value_bits=value_bits)
    assert spec.bytes_per_token == size
    c = target_of(torch.randn(2, 151_936), spec)
    assert encode(c, spec).shape == (2, size)


@pytest.mark.parametrize(("value_bits", "limit"), [(8, 2e-5), (6, 3e-4)])
@pytest.mark.parametrize("k", [32, 64, 128])
@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.5, 2.0, 4.0])
def test_the_codec_costs_little_on_power_law_rows_from_flat_to_sharp(
    exponent: float, k: int, value_bits: int, limit: float
) -> None:
    c = compress(power_law_logits(48, 8192, exponent=exponent), TargetSpec(8192, k))
    spec = TargetSpec(8192, k, value_bits=value_bits)
    found = fidelity(c, decode(encode(c, spec), spec))
    assert 0.0 < found.codec_kl <= limit
    assert found.worst_kl <= 4 * limit


def test_eight_bits_lose_less_than_rounding_the_logits_to_bfloat16() -> None:
    logits = 20.0 + power_law_logits(48, 8192, exponent=1.5)
    c, spec = compress(logits, TargetSpec(logits.shape[1], 64)), TargetSpec(8192, 64)
    exact, rounded = (
        logits.double().log_softmax(dim=1),
        logits.bfloat16().double().log_softmax(dim=1),
    )
    rounding_kl = (exact.exp() * (exact - rounded)).sum(dim=1).mean().item()
    assert fidelity(c, decode(encode(c, spec), spec)).codec_kl < rounding_kl


def golden_records() -> dict[str, bytes]:
    return {
        name: bytes.fromhex(record)
        for name, record in (line.split() for line in GOLDEN.read_text().splitlines())
    }


LOG2 = math.log(2.0)
GOLDEN_CASES = {
    "eight_bits": (
        TargetSpec(1000, 4),
        row_of(
            [17, 999, 3, 500], [-LOG2, -2 * LOG2, -3 * LOG2, -4 * LOG2], -4 * LOG2, vocab_size=1000
        ),
        row_of(
            [17, 999, 3, 500],
            [-0.692483, -1.387702, -2.078875, -2.772561],
            -2.773438,
            vocab_size=1000,
        ),
    ),
    "six_bits_and_draws": (
        TargetSpec(1000, 3, num_draws=5, value_bits=6),
        row_of(
            [512, 0, 511], [-0.25, -2.0, -9.0], -2.455, vocab_size=1000, draws=(1, 1, 640, 998, 999)
        ),
        row_of(
            [512, 0, 511],
            [-0.242649, -2.044287, -8.992649],
            -2.455078,
            vocab_size=1000,
            draws=(1, 1, 640, 998, 999),
        ),
    ),
    "only_draws": (
        TargetSpec(7, 0, num_draws=9),
        row_of([], [], 0.0, vocab_size=7, draws=(0, 0, 1, 3, 3, 3, 5, 6, 6)),
        row_of([], [], 0.0, vocab_size=7, draws=(0, 0, 1, 3, 3, 3, 5, 6, 6)),
    ),
    "whole_vocabulary_with_an_impossible_id": (
        TargetSpec(3, 3),
        row_of([2, 0, 1], [-LOG2, -LOG2, -math.inf], -math.inf, vocab_size=3),
        row_of([0, 2, 1], [-LOG2, -LOG2, -LOG2 - 40], -math.inf, vocab_size=3),
    ),
}


@in_both_libraries
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_bytes_are_written_and_read_for_ever(name: str, library: ModuleType) -> None:
    spec, exact, wanted = GOLDEN_CASES[name]
    golden = golden_records()[name]
    assert library.encode(exact, spec).numpy().tobytes() == golden
    decoded = library.decode(torch.tensor([list(golden)], dtype=torch.uint8), spec)
    assert torch.equal(decoded.token_ids_TK, wanted.token_ids_TK)
    assert torch.equal(decoded.tail_ids_TN, wanted.tail_ids_TN)
    torch.testing.assert_close(decoded.logprobs_TK, wanted.logprobs_TK, rtol=0.0, atol=2e-6)
    torch.testing.assert_close(decoded.tail_logmass_T, wanted.tail_logmass_T, rtol=0.0, atol=1e-6)


def test_every_golden_record_is_tested() -> None:
    assert golden_records().keys() == GOLDEN_CASES.keys()


@pytest.mark.parametrize(
    ("tail", "stored"),
    [
        (-math.inf, -math.inf),
        (0.0, -(2.0**-24)),
        (1e-7, -(2.0**-24)),
        (-1e-9, -(2.0**-24)),
        (-1e5, -65504.0),
        (-16.0, -16.0),
    ],
)
def test_tails_from_none_to_nearly_everything_survive_with_some_kept_mass(
    tail: float, stored: float
) -> None:
    spec = TargetSpec(50, 2)
    decoded = decode(encode(row_of([4, 9], [-0.5, -1.5], tail, vocab_size=50), spec), spec)
    assert decoded.tail_logmass_T.item() == stored
    kept = decoded.logprobs_TK.double().exp().sum().item()
    assert kept == pytest.approx(-math.expm1(stored), rel=1e-6)
    assert kept > 0


def test_entries_of_no_probability_are_stored_forty_nats_below_the_best() -> None:
    spec = TargetSpec(50, 4)
    decoded = decode(
        encode(row_of([9, 4, 7, 8], [-0.1, -2.6, -77.0, -math.inf], -5.0, vocab_size=50), spec),
        spec,
    )
    best = decoded.logprobs_TK[0, 0].item()
    assert decoded.token_ids_TK.tolist() == [[9, 4, 7, 8]]
    assert decoded.logprobs_TK[0, 2:].tolist() == pytest.approx([best - 40.0] * 2, abs=1e-5)


def test_no_tokens_have_no_records() -> None:
    spec = TargetSpec(50, 4, num_draws=3)
    records = encode(target_of(torch.empty(0, 50), spec), spec)
    assert records.shape == (0, spec.bytes_per_token)
    assert decode(records, spec).logprobs_TK.shape == (0, 4)


def test_many_rows_are_the_rows_one_by_one_wherever_they_lie_in_memory() -> None:
    spec = TargetSpec(5000, 4096, num_draws=4)
    c = target_of(torch.randn(40, 5000, generator=torch.Generator().manual_seed(0)), spec)
    rows = [token_of(c, row) for row in range(40)]
    records = encode(c, spec)
    assert torch.equal(records, torch.cat([encode(row, spec) for row in rows]))
    backwards = decode(records.flip(0).T.contiguous().T, spec)
    assert_equal(backwards.map(lambda t: t.flip(0)), decode(records, spec))
    assert_equal(
        decode(records, spec), concatenate([decode(record[None], spec) for record in records])
    )


def test_the_order_in_which_entries_are_given_does_not_matter() -> None:
    spec = TargetSpec(200, 16)
    c = compress(torch.randn(3, 200).round(), TargetSpec(200, 16))
    shuffled = torch.randperm(16)
    mixed = CompressedLogits(
        c.token_ids_TK[:, shuffled],
        c.logprobs_TK[:, shuffled],
        c.tail_logmass_T,
        c.tail_ids_TN,
        vocab_size=200,
    )
    assert torch.equal(encode(mixed, spec), encode(c, spec))


# Refusals
# ------------------------------------------------------------------------------------------------

SMALL = TargetSpec(
    100,
    4,
    num_draws=3,
    # header 0:4, kept ids 4:6 and 6:8 (11 bits of 16), codes 8:12, draws 12:14 (15 bits of 16) and
    # 14 (7 of 8)
)


def small_records() -> torch.Tensor:
    return encode(target_of(torch.linspace(0, 3, 100).expand(20, 100), SMALL), SMALL)


def half(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


@in_both_libraries
@pytest.mark.parametrize(
    ("place", "values", "complaint"),
    [
        (0, half(math.nan), "range outside"),
        (0, half(math.inf), "range outside"),
        (0, half(0.5), "range outside"),
        (0, half(-2.0), "range outside"),
        (0, half(40.5), "range outside"),
        (2, half(math.nan), "tail mass"),
        (2, half(0.0), "tail mass"),
        (2, half(math.inf), "tail mass"),
        (2, half(0.5), "tail mass"),
        (6, [0b1, 0], "another number of ids than 4"),
        (6, [0b11111, 0], "another number of ids than 4"),
        (6, [0, 0b11110000], "outside 0..99"),
        (4, [0, 0], "out of order, or one of them twice"),
        (8, [1, 2, 3, 255], "no best entry"),
        (0, half(2.0), "do not fill their range"),
        (14, [0b11], "another number of ids than 3"),
        (12, [0, 0, 0b11100000], "outside 0..99"),
        (12, [0b11111, 0, 0b111], "out of order"),
        (13, [0b10000000], "bits set after the last value"),
    ],
)
def test_an_impossible_record_is_refused_by_its_row(
    place: int, values: list[int], complaint: str, library: ModuleType
) -> None:
    records = small_records()
    assert records.shape == (20, 15)
    records[17, place : place + len(values)] = torch.tensor(values, dtype=torch.uint8)
    with pytest.raises(ChunkError, match=f"row 17 .*{complaint}"):
        library.decode(records, SMALL)


def test_a_bad_row_is_named_by_its_place_among_all_rows() -> None:
    spec = TargetSpec(5000, 4096)
    records = encode(target_of(torch.randn(40, 5000), spec), spec)
    records[33, 0:2] = 255
    with pytest.raises(ChunkError, match="row 33 "):
        decode(records, spec)


def test_a_tail_beside_a_whole_vocabulary_is_refused() -> None:
    spec = TargetSpec(3, 3)
    c = compress(torch.zeros(1, 3), TargetSpec(3, 3))
    records = encode(c, spec)
    records[0, 2:4] = torch.tensor(half(-1.0), dtype=torch.uint8)
    with pytest.raises(ChunkError, match="tail mass"):
        decode(records, spec)
    with pytest.raises(ChunkError, match="no distribution"):
        encode(row_of([0, 1, 2], [-1.0, -1.0, -1.0], -3.0, vocab_size=3), spec)


@pytest.mark.parametrize(
    "records",
    [torch.zeros(2, 14, dtype=torch.uint8), torch.zeros(15, dtype=torch.uint8), torch.zeros(2, 15)],
)
def test_records_of_another_shape_or_type_are_refused(records: torch.Tensor) -> None:
    with pytest.raises(ChunkError, match="wanted uint8 \\[tokens, 15\\]"):
        decode(records, SMALL)


@in_both_libraries
@pytest.mark.parametrize(
    "bad",
    [
        row_of([3, 100], [-1.0, -2.0], -1.0, vocab_size=100),
        row_of([-1, 3], [-1.0, -2.0], -1.0, vocab_size=100),
        row_of([3, 3], [-1.0, -2.0], -1.0, vocab_size=100),
        row_of([3, 4], [math.nan, -2.0], -1.0, vocab_size=100),
        row_of([3, 4], [-1.0, math.nan], -1.0, vocab_size=100),
        row_of([3, 4], [-math.inf, -math.inf], -1.0, vocab_size=100),
        row_of([3, 4], [-1.0, -2.0], math.nan, vocab_size=100),
        row_of([3, 4], [-1.0, -2.0], 0.5, vocab_size=100),
    ],
)
def test_a_target_that_is_no_distribution_over_the_vocabulary_is_not_written(
    bad: CompressedLogits, library: ModuleType
) -> None:
    good = row_of([3, 4], [-1.0, -2.0], -1.0, vocab_size=100)
    with pytest.raises(ChunkError, match="row 1 "):
        library.encode(concatenate([good, bad]), TargetSpec(100, 2))


@in_both_libraries
@pytest.mark.parametrize("draws", [(3, 100), (-1, 3), (4, 3)])
def test_draws_out_of_order_or_vocabulary_are_not_written(
    draws: tuple[int, ...], library: ModuleType
) -> None:
    with pytest.raises(ChunkError, match="row 0 "):
        library.encode(
            row_of([], [], 0.0, vocab_size=100, draws=draws), TargetSpec(100, 0, num_draws=2)
        )


@pytest.mark.parametrize(
    "spec",
    [
        TargetSpec(101, 2),
        TargetSpec(100, 3),
        TargetSpec(100, 2, num_draws=1),
        TargetSpec(100, 2, temperature=2.0),
    ],
    ids=["V", "k", "draws", "temperature"],
)
def test_a_codec_of_another_shape_than_the_target_is_refused(spec: TargetSpec) -> None:
    with pytest.raises(ConfigError, match="build both from one recipe"):
        encode(row_of([3, 4], [-1.0, -2.0], -1.0, vocab_size=100), spec)
