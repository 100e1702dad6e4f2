"""The codec in torch equals the codec in numpy: the same bytes, ids and refusals, with one
synchronisation with the device.

The tests of the codec compare numpy's with the layout. Here both run on the CPU.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.errors import ChunkError
from stillhouse.logits import (
    CompressedLogits,
    TargetSpec,
    codec_numpy,
    codec_torch,
    compress,
    decode,
    encode,
)

TENSORS = ("token_ids_TK", "logprobs_TK", "tail_logmass_T", "tail_ids_TN")


def assert_same(found: CompressedLogits, wanted: CompressedLogits) -> None:
    for name in TENSORS:
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    for name in ("token_ids_TK", "tail_logmass_T", "tail_ids_TN"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    torch.testing.assert_close(
        found.logprobs_TK, wanted.logprobs_TK, rtol=2 * torch.finfo(torch.float32).eps, atol=1e-14
    )
    assert (found.vocab_size, found.temperature) == (wanted.vocab_size, wanted.temperature)


def target_of(
    spec: TargetSpec,
    num_tokens: int,
    *,
    seed: int,
    spread: float = 5.0,
    rounded: bool = False,
    ruled_out: float = 0.0,
) -> CompressedLogits:
    """Distinct ids from anywhere with log-probabilities below their best, in no order; a part of
    them impossible. Draws with repeats."""
    random = np.random.default_rng(seed)
    ids = [random.choice(spec.vocab_size, spec.k, replace=False) for _ in range(num_tokens)]
    drops = np.abs(random.normal(0, spread, (num_tokens, spec.k)))
    drops = drops.round() if rounded else drops
    drops[random.random(drops.shape) < ruled_out] = math.inf
    drops[:, :1] = 0.0
    tail = (
        np.full(num_tokens, -math.inf)
        if spec.k == spec.vocab_size
        else -random.exponential(4.0, num_tokens)
    )
    return CompressedLogits(
        torch.from_numpy(np.array(ids, np.int32).reshape(num_tokens, spec.k)),
        torch.from_numpy((-0.3 - drops).astype(np.float32)),
        torch.from_numpy(tail.astype(np.float32)),
        torch.from_numpy(
            np.sort(
                random.integers(spec.vocab_size, size=(num_tokens, spec.num_draws), dtype=np.int32)
            )
        ),
        vocab_size=spec.vocab_size,
        temperature=spec.temperature,
    )


@st.composite
def specs(draw: st.DrawFn) -> TargetSpec:
    powers_of_two = st.integers(0, 18).map(lambda power: 2**power)
    vocab_size = draw(
        st.one_of(
            st.integers(1, 40), powers_of_two, st.sampled_from([50_257, 151_936, 262_143, 262_145])
        )
    )
    k = draw(st.one_of(st.integers(0, min(vocab_size, 130)), st.just(min(vocab_size, 130))))
    return TargetSpec(
        vocab_size,
        k,
        num_draws=draw(st.integers(0 if k else 1, 60)) if k < vocab_size else 0,
        value_bits=draw(st.sampled_from([6, 8])),
        temperature=draw(st.sampled_from([1.0, 2.5])),
    )


@st.composite
def cases(draw: st.DrawFn, *, least_tokens: int = 0) -> tuple[CompressedLogits, TargetSpec]:
    spec = draw(specs())
    c = target_of(
        spec,
        draw(st.integers(least_tokens, 5)),
        seed=draw(st.integers(0, 10**6)),
        spread=draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0])),
        rounded=draw(st.booleans()),
        ruled_out=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    return c, spec


@given(case=cases())
@example(case=(target_of(TargetSpec(1, 1), 2, seed=0), TargetSpec(1, 1)))
@example(case=(target_of(TargetSpec(1, 0, num_draws=1), 2, seed=0), TargetSpec(1, 0, num_draws=1)))
@example(
    case=(
        target_of(TargetSpec(262_144, 0, num_draws=50), 3, seed=0),
        TargetSpec(262_144, 0, num_draws=50),
    )
)
@example(
    case=(
        target_of(TargetSpec(262_144, 64, value_bits=6), 3, seed=0),
        TargetSpec(262_144, 64, value_bits=6),
    )
)
@settings(max_examples=300, deadline=None)
def test_records_and_what_they_hold_are_the_processors(
    case: tuple[CompressedLogits, TargetSpec],
) -> None:
    c, spec = case
    records = codec_torch.encode(c, spec)
    assert (records.dtype, records.shape) == (torch.uint8, (c.num_tokens, spec.bytes_per_token))
    assert torch.equal(records, codec_numpy.encode(c, spec))
    assert_same(codec_torch.decode(records, spec), codec_numpy.decode(records, spec))


@pytest.mark.parametrize(("k", "num_draws"), [(0, 50), (1, 0), (12, 12), (64, 0), (300, 0)])
def test_targets_straight_from_logits_have_the_processors_records(k: int, num_draws: int) -> None:
    logits = 3 * torch.randn(200, 300, generator=torch.Generator().manual_seed(k))
    spec = TargetSpec(300, k, num_draws=num_draws, temperature=1.5)
    c = compress(logits, spec, seeds_T=torch.arange(200))
    records = codec_torch.encode(c, spec)
    assert torch.equal(records, codec_numpy.encode(c, spec))
    assert_same(codec_torch.decode(records, spec), codec_numpy.decode(records, spec))


@pytest.mark.parametrize("value_bits", [6, 8])
def test_values_on_the_edge_between_two_codes_fall_on_the_processors_side(value_bits: int) -> None:
    """Where a square root that is not the nearest number would show; torch's own of float32 on a
    processor is such."""
    # of binary16 from 1 to 40
    ranges = np.arange(0x3C00, 0x5101, 11, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = (np.arange(2**value_bits - 1) + 0.5) / (2**value_bits - 1)
    edges = (1 + (np.sqrt(1 + ranges[:, None].astype(np.float64)) - 1) * halves) ** 2 - 1
    above = np.concatenate(
        [edges + steps * 2.0**-23 * (1 + edges) for steps in (-1, -0.5, 0, 0.5, 1)], axis=1
    )
    drops = np.concatenate([np.zeros((len(ranges), 1)), above, ranges[:, None]], axis=1).clip(
        max=ranges[:, None]
    )
    num_rows, k = drops.shape
    c = CompressedLogits(
        torch.arange(k, dtype=torch.int32).repeat(num_rows, 1),
        torch.from_numpy(-drops.astype(np.float32)),
        torch.full((num_rows,), -2.0),
        torch.empty((num_rows, 0), dtype=torch.int32),
        vocab_size=4096,
    )
    spec = TargetSpec(4096, k, value_bits=value_bits)
    records = codec_torch.encode(c, spec)
    assert torch.equal(records, codec_numpy.encode(c, spec))
    assert_same(codec_torch.decode(records, spec), codec_numpy.decode(records, spec))


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except ChunkError as error:
        return str(error)


DAMAGES = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.one_of(st.integers(0, 3), st.integers(0, 10**6)),
        st.integers(1, 255),
    ),
    min_size=1,
)


@given(case=cases(least_tokens=1), damages=DAMAGES)
@settings(max_examples=400, deadline=None)
def test_damaged_records_are_refused_by_the_same_row_for_the_same_reason(
    case: tuple[CompressedLogits, TargetSpec], damages: list[tuple[int, int, int]]
) -> None:
    c, spec = case
    records = codec_numpy.encode(c, spec)
    for row, place, flip in damages:
        records[row % len(records), place % spec.bytes_per_token] ^= flip
    found, wanted = (
        outcome(partial(library.decode, records, spec)) for library in (codec_torch, codec_numpy)
    )
    if isinstance(wanted, str):
        assert found == wanted
    else:
        assert_same(found, wanted)


NONSENSE: dict[str, list[float]] = {
    "token_ids_TK": [-1, 0, 1, 262_146, 2**31 - 1, -(2**31)],
    "logprobs_TK": [math.nan, math.inf, -math.inf, 0.0, 3e38],
    "tail_logmass_T": [math.nan, math.inf, -math.inf, 0.0, 5e-4, 0.5, -1e-9, -1e6],
    "tail_ids_TN": [-1, 0, 262_146, 2**31 - 1],
}
MISTAKES = st.lists(
    st.sampled_from(
        [(name, value) for name, values in NONSENSE.items() for value in values]
    ).flatmap(lambda mistake: st.tuples(st.just(mistake), st.integers(0, 10**6))),
    min_size=1,
    max_size=4,
)


@given(case=cases(least_tokens=1), mistakes=MISTAKES)
@settings(max_examples=400, deadline=None)
def test_targets_that_cannot_be_written_are_refused_by_the_same_row_for_the_same_reason(
    case: tuple[CompressedLogits, TargetSpec], mistakes: list[tuple[tuple[str, float], int]]
) -> None:
    c, spec = case
    for (name, value), place in mistakes:
        values = getattr(c, name).view(-1)
        if len(values):
            values[place % len(values)] = value
    found, wanted = (
        outcome(partial(library.encode, c, spec)) for library in (codec_torch, codec_numpy)
    )
    assert found == wanted if isinstance(wanted, str) else torch.equal(found, wanted)


SEVERAL_BLOCKS = TargetSpec(4096, 2048, num_draws=64), 1100


def test_rows_of_several_blocks_are_the_processors_and_a_bad_one_is_named_among_them_all() -> None:
    spec, num_tokens = SEVERAL_BLOCKS
    assert num_tokens * (spec.k + spec.num_draws) > codec_torch._BLOCK_ENTRIES
    records = torch.cat(
        [
            codec_numpy.encode(target_of(spec, 50, seed=seed), spec)
            for seed in range(num_tokens // 50)
        ]
    )
    target = codec_torch.decode(records, spec)
    assert_same(target, codec_numpy.decode(records, spec))
    assert torch.equal(codec_torch.encode(target, spec), records)
    records[num_tokens - 7, :2] = 255
    records[num_tokens - 3, 4] ^= 1
    with pytest.raises(ChunkError, match=f"row {num_tokens - 7} has a range outside"):
        codec_torch.decode(records, spec)


class Answers(TorchDispatchMode):
    """Counts what makes the processor wait for the device: numbers that it asks for, shapes that
    depend on them, and copies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_waits = 0

    def __torch_dispatch__(
        self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"}
        moves = "device" in (kwargs or {}) and operation.overloadpacket.__name__ == "_to_copy"
        self.num_waits += moves or operation.overloadpacket.__name__ in waits
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("spec", "num_tokens"), [(TargetSpec(500, 8, num_draws=3, value_bits=6), 64), SEVERAL_BLOCKS]
)
def test_the_device_is_waited_for_once(spec: TargetSpec, num_tokens: int) -> None:
    c = target_of(spec, num_tokens, seed=0)
    with Answers() as encoding:
        records = codec_torch.encode(c, spec)
    with Answers() as decoding:
        codec_torch.decode(records, spec)
    assert (encoding.num_waits, decoding.num_waits) == (1, 1)


def test_what_is_not_on_the_processor_is_coded_where_it_lies() -> None:
    """A device without numbers shows it: all is computed there, up to the question of what to
    refuse."""
    spec = TargetSpec(500, 8, num_draws=3)
    c = target_of(spec, 4, seed=0).map(lambda tensor: tensor.to("meta"))
    with pytest.raises(RuntimeError, match="meta tensors"):
        encode(c, spec)
    with pytest.raises(RuntimeError, match="meta tensors"):
        decode(torch.empty((4, spec.bytes_per_token), dtype=torch.uint8, device="meta"), spec)
