"""The kernels of `blockmax_triton` for draws from the tail, and for the log-probabilities of given
ids; arguments as in its other kernels.

D is the number of draws of one program, S that of the blocks among which it looks for one. Sums
that decide a draw are of whole numbers, so that they are exact in any order.
"""

import triton
import triton.language as tl

from stillhouse.logits.topk.blockmax_kernels_triton import (
    LEAST_SUM,
    below,
    capped,
    entries,
)

# The whole numbers for the mass of a row's blocks, and for the greatest mass in a block.
_ROW_MASS = tl.constexpr(2.0**52)
_GREATEST_MASS = tl.constexpr(2.0**40)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-53)
_ULP_OF_ONE = tl.constexpr(2.0**-53)
# Of splitmix64 (`stillhouse.seeded`), here as unsigned numbers.
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _random_bits(seed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """uint64: splitmix64 of the seed and the numbers from 1 on."""
    x = seed.to(tl.uint64) + _GOLDEN * index.to(tl.uint64)
    x = (x ^ (x >> 30)) * _FIRST_FACTOR
    x = (x ^ (x >> 27)) * _SECOND_FACTOR
    return x ^ (x >> 31)


@triton.jit
def _masses(
    sums: tl.tensor,
    num_kept: tl.tensor,
    blocks: tl.tensor,
    num_blocks: tl.tensor,
    unit: tl.tensor,
    each: tl.tensor,
    vocab_size: tl.tensor,
    B: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> tl.tensor:
    """int64: the proposal's mass in some blocks: their sums in units of float64 and, for weighted
    draws, `each` for each of their ids that is not kept. And the part of it that is the tail's."""
    exist = blocks < num_blocks
    tail = (tl.load(sums + blocks, mask=exist, other=0.0).to(tl.float64) * unit).to(tl.int64)
    mass = tail
    if WEIGHTED:
        kept = tl.load(num_kept + blocks, mask=exist, other=0).to(tl.int32)
        num_ids = tl.minimum(vocab_size - blocks * B, B)
        mass += tl.where(exist, num_ids - kept, 0).to(tl.int64) * each
    return mass, tail


@triton.jit
def _blocks_of(
    shares: tl.tensor,
    sums: tl.tensor,
    num_kept: tl.tensor,
    num_blocks: tl.tensor,
    each: tl.tensor,
    vocab_size: tl.tensor,
    B: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> tl.tensor:
    """The block in which each share of the proposal's mass ends, the fraction of the block before
    it, the block's mass, and the part of it that is the tail's.

    First the S blocks among which it is, then the block, so that no draw looks at every block.
    """
    # whole numbers for the blocks' masses
    groups = tl.arange(0, M // S)
    blocks = groups[:, None] * S + tl.arange(0, S)[None, :]
    rest = tl.load(sums + blocks, mask=blocks < num_blocks, other=0.0).to(tl.float64)
    unit = _ROW_MASS / tl.maximum(tl.sum(tl.sum(rest, axis=1), axis=0), LEAST_SUM)
    masses, _ = _masses(sums, num_kept, blocks, num_blocks, unit, each, vocab_size, B, WEIGHTED)
    up_to = tl.cumsum(tl.sum(masses, axis=1), axis=0)
    places = shares * tl.max(up_to, axis=0).to(tl.float64)

    # the S blocks
    passed = up_to[None, :] <= places.to(tl.int64)[:, None]
    first = tl.minimum(tl.sum(passed.to(tl.int32), axis=1), M // S - 1) * S
    before = tl.max(tl.where(passed, up_to[None, :], 0), axis=1)

    # the block
    among = first[:, None] + tl.arange(0, S)[None, :]
    masses, _ = _masses(sums, num_kept, among, num_blocks, unit, each, vocab_size, B, WEIGHTED)
    up_to = before[:, None] + tl.cumsum(masses, axis=1)
    passed = up_to <= places.to(tl.int64)[:, None]
    block = tl.minimum(first + tl.sum(passed.to(tl.int32), axis=1), num_blocks - 1)
    before = tl.maximum(before, tl.max(tl.where(passed, up_to, 0), axis=1))
    mass, tail = _masses(sums, num_kept, block, num_blocks, unit, each, vocab_size, B, WEIGHTED)
    mass = tl.maximum(mass, 1)
    return block, (places - before.to(tl.float64)) / mass.to(tl.float64), mass, tail


@triton.jit
def _mixed(
    masses: tl.tensor, exist: tl.tensor, mass: tl.tensor, tail: tl.tensor, each: tl.tensor
) -> tl.tensor:
    """int64: for each draw, whole masses in proportion to the proposal in a block: to `masses`, as
    much in all as the tail's part of the block's mass, and to `each` where there is an id."""
    unit = tl.full((), _ROW_MASS, tl.float64) / mass.to(tl.float64)
    sums = tl.maximum(tl.sum(masses, axis=1), 1).to(tl.float64)
    of_tail = masses.to(tl.float64) * (tail.to(tl.float64) * unit / sums)[:, None]
    of_each = (each.to(tl.float64) * unit).to(tl.int64)
    return of_tail.to(tl.int64) + tl.where(exist, of_each[:, None], 0)


@triton.jit
def draw(
    products: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    num_blocks: tl.tensor,
    inverse: tl.tensor,
    rest_sums: tl.tensor,
    num_kept: tl.tensor,
    ids_in: tl.tensor,
    values_in: tl.tensor,
    seeds: tl.tensor,
    num_draws: tl.tensor,
    draws_out: tl.tensor,
    K: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> None:
    """D draws of a row from the ids that are not kept, as `draws.draw_in_blocks` makes them."""
    # the place of each draw: its block, and the fraction of the block's mass before it
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * D + tl.arange(0, D)
    random = (_random_bits(tl.load(seeds + row), index + 1) >> 11).to(tl.float64) * _ULP_OF_ONE
    below_one = tl.full((D,), _BELOW_ONE, tl.float64)
    shares = tl.minimum((index.to(tl.float64) + random) / num_draws, below_one)
    each = (tl.full((), _ROW_MASS, tl.float64) / (vocab_size - K)).to(tl.int64)
    at = row * num_blocks
    blocks, fractions, mass, tail = _blocks_of(
        shares, rest_sums + at, num_kept + at, num_blocks, each, vocab_size,
        B, M, M if M < 64 else 64, WEIGHTED,
    )  # fmt: skip
    fractions = tl.minimum(tl.maximum(fractions, 0.0), below_one)

    # the block's entries that are not kept, as whole masses
    z, ids, exist = entries(
        products, row_stride, vocab_size, scale, softcap, row, blocks, index >= 0, B, HAS_SOFTCAP
    )
    if K > 0:
        least, last = tl.load(values_in + row * K + K - 1), tl.load(ids_in + row * K + K - 1)
        exist = exist & ((z < least) | ((z == least) & (ids > last)))
        z = tl.where(exist, z, -float("inf"))
    peaks = tl.max(z, axis=1)
    peaks = tl.where(peaks == -float("inf"), 0.0, peaks)
    weights = tl.exp((z - peaks[:, None]) * inverse).to(tl.float64)
    masses = (weights * _GREATEST_MASS).to(tl.int64)
    if WEIGHTED:
        masses = _mixed(masses, exist, mass, tail, each)

    # the id at the same fraction of their mass
    within = tl.cumsum(masses, axis=1)
    total = tl.max(within, axis=1)
    wanted = (fractions * total.to(tl.float64)).to(tl.int64)
    offset = tl.sum((within <= wanted[:, None]).to(tl.int32), axis=1)
    drawn = tl.minimum(blocks * B + offset, vocab_size - 1)
    tl.store(draws_out + row * num_draws + index, drawn, mask=index < num_draws)


@triton.jit
def look_up(
    products: tl.tensor,
    row_stride: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    inverse: tl.tensor,
    inverse_low: tl.tensor,
    tops: tl.tensor,
    log_sums: tl.tensor,
    ids_in: tl.tensor,
    num_ids: tl.tensor,
    logprobs_out: tl.tensor,
    X: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
) -> None:
    """The log-probabilities of `num_ids` ids of a row, X at most."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, X)
    at, exist = row * num_ids + places, places < num_ids
    ids = tl.load(ids_in + at, mask=exist, other=0)
    z = tl.load(products + row * row_stride + ids, mask=exist, other=0.0).to(tl.float32)
    z = capped(z * scale, softcap, HAS_SOFTCAP)
    top = tl.load(tops + row)
    lower = below(z, tl.where(top == -float("inf"), 0.0, top), inverse, inverse_low)
    logprobs = (lower - tl.load(log_sums + row)).to(tl.float32)
    tl.store(logprobs_out + at, logprobs, mask=exist)
