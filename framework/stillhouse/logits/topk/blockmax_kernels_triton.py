"""The kernels of `blockmax_triton`, which has their order, their sizes and the names of shapes.

Arguments are pointers to contiguous tensors, but for the products, whose rows are `row_stride`
apart. `inverse` is 1 / temperature in float32, and `inverse_low` what float32 loses of it. D is the
number of draws of one program. What decides a value of the target is computed in float64, and sums
that decide a draw are of whole numbers, so that they are exact in any order.
"""

import triton
import triton.language as tl

# An id XOR this one counts from the end, so that ties go to the lowest id.
_LAST_ID = tl.constexpr(2**31 - 1)
_NO_KEY = tl.constexpr(-(2**63))
_LEAST_SUM = tl.constexpr(1e-30)  # relative to a row's maximum: below, float32 loses the digits
_LOG2_E = tl.constexpr(1.4426950408889634)
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
def _capped(z: tl.tensor, softcap: tl.tensor, HAS_SOFTCAP: tl.constexpr) -> tl.tensor:
    """Logits of scaled products."""
    if HAS_SOFTCAP:
        z = (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0) * softcap
    return z


@triton.jit
def _ordered(z: tl.tensor) -> tl.tensor:
    """int32 in the order of the float32; -0 as +0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(order: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """int64 by the logit's order, ties by id descending."""
    return (order.to(tl.int64) << 32) | (ids ^ _LAST_ID).to(tl.int64)


@triton.jit
def _entries(
    products: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    row: tl.tensor,
    blocks: tl.tensor,
    wanted: tl.tensor,
    B: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """Logits [blocks, B] of some blocks of a row, their ids, and whether they exist."""
    ids = blocks[:, None] * B + tl.arange(0, B)[None, :]
    exist = wanted[:, None] & (ids < vocab_size)
    z = tl.load(products + row * row_stride + ids, mask=exist, other=0.0).to(tl.float32)
    z = tl.where(exist, _capped(z * scale, softcap, HAS_SOFTCAP), -float("inf"))
    return z, ids, exist


@triton.jit
def read(
    products: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    readable: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    num_blocks: tl.tensor,
    inverse: tl.tensor,
    B: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
) -> None:
    """A tile of blocks: each one's greatest logit, and sum of exp((logit - it) / temperature).

    Loads are masked by the `readable` columns, which may be more than V, so that they are as wide
    as the row's alignment allows; the last tile drops what is no logit.
    """
    # logits, but for a scale without a softcap, which the exponential and the maximum take
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    blocks = tile * TILE + tl.arange(0, TILE)
    ids = blocks[:, None] * B + tl.arange(0, B)[None, :]
    z = tl.load(products + row * row_stride + ids, mask=ids < readable, other=-float("inf"))
    z = z.to(tl.float32)
    factor = inverse * _LOG2_E
    if HAS_SOFTCAP:
        z = _capped(z * scale, softcap, HAS_SOFTCAP)
    else:
        factor *= scale
    if tile == tl.num_programs(1) - 1:
        z = tl.where(ids < vocab_size, z, -float("inf"))

    # one fused multiply-add and one power of 2 each; the rounding of the part that a block shares
    # is known, and taken from its sum
    top = tl.max(z, axis=1)
    base = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN
    shared = base * factor
    lost = tl.fma(base, factor, -shared)
    total = tl.sum(tl.exp2(tl.fma(z, factor, -shared[:, None])), axis=1) * tl.exp2(-lost)
    if not HAS_SOFTCAP:
        top *= scale
    tl.store(maxima + row * num_blocks + blocks, top, mask=blocks < num_blocks)
    tl.store(sums + row * num_blocks + blocks, total, mask=blocks < num_blocks)


@triton.jit
def pick(
    maxima: tl.tensor,
    sums: tl.tensor,
    num_blocks: tl.tensor,
    inverse: tl.tensor,
    found: tl.tensor,
    least: tl.tensor,
    tops: tl.tensor,
    rest_sums: tl.tensor,
    rest_totals: tl.tensor,
    K: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """The K blocks with the greatest maxima, the K-th maximum, and the sums of the other blocks.

    Maxima differ in the highest `BITS` bits of their order alone, and M is less than 2^15.
    """
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, M)
    exist = blocks < num_blocks
    maximum = tl.load(maxima + row * num_blocks + blocks, mask=exist, other=-float("inf"))
    total = tl.load(sums + row * num_blocks + blocks, mask=exist, other=0.0)

    # a number that at least K maxima reach, from its highest bit down: the greatest, or the first
    # that exactly K reach. As an unsigned number, in which a block that is not there is the least.
    order = tl.where(exist, _ordered(maximum), -(2**31))
    rank = order.to(tl.uint32, bitcast=True) ^ (1 << 31)
    threshold = tl.zeros((), tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    num_left = tl.full((), BITS, tl.int32)
    while num_left > 0:
        candidate = threshold | bit
        num_reaching = tl.sum((rank >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(num_reaching >= K, candidate, threshold)
        bit = bit >> 1
        num_left = tl.where(num_reaching == K, 0, num_left - 1)

    # all blocks above the least maximum that reaches it, and the first of those that equal it; one
    # scan counts both
    kth = tl.min(tl.where(rank >= threshold, order, 2**31 - 1), axis=0)
    above, level = (order > kth).to(tl.int32), (exist & (order == kth)).to(tl.int32)
    counts = tl.cumsum(above | (level << 16), axis=0)
    num_above, num_level = counts & 0xFFFF, counts >> 16
    room = K - tl.sum(above, axis=0)
    taken = (above != 0) | ((level != 0) & (num_level <= room))
    place = num_above + tl.minimum(num_level, room) - 1
    tl.store(found + row * K + place, blocks, mask=taken)
    tl.store(least + row, kth)

    # the other blocks' sums, relative to the row's maximum
    top = tl.max(maximum, axis=0)
    base = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2((maximum - base) * (inverse * _LOG2_E))
    left = tl.where(taken, 0.0, total * weight)
    tl.store(tops + row, top)
    tl.store(rest_sums + row * num_blocks + blocks, left, mask=exist)
    tl.store(rest_totals + row, tl.sum(left.to(tl.float64), axis=0))


@triton.jit
def gather(
    products: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    found: tl.tensor,
    least: tl.tensor,
    keys: tl.tensor,
    counts: tl.tensor,
    K: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
) -> None:
    """The keys of the found blocks' entries that reach the K-th maximum, and how many there are."""
    # some of the found blocks after the others
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(least + row)
    count = tl.full((), 0, tl.int32)
    for start in range(0, K, CHUNK):
        which = start + tl.arange(0, CHUNK)
        blocks = tl.load(found + row * K + which, mask=which < K, other=0)
        z, ids, exist = _entries(
            products, row_stride, vocab_size, scale, softcap, row, blocks, which < K, B, HAS_SOFTCAP
        )
        # each entry behind those that reach the threshold before it
        order = _ordered(z)
        reach = tl.reshape((exist & (order >= threshold)).to(tl.int32), [CHUNK * B])
        places = count + tl.cumsum(reach, axis=0) - 1
        key = tl.reshape(_key(order, ids), [CHUNK * B])
        tl.store(keys + row * C + places, key, mask=(reach != 0) & (places < C))
        count += tl.sum(reach, axis=0)
    tl.store(counts + row, count)


@triton.jit
def _rank(
    keys: tl.tensor,
    count: tl.tensor,
    ids_out: tl.tensor,
    values_out: tl.tensor,
    K: tl.constexpr,
    C: tl.constexpr,
) -> tl.tensor:
    """Store the ids and logits of a row's K greatest keys; the sorted logits and the last key."""
    places = tl.arange(0, C)
    key = tl.sort(tl.load(keys + places, mask=places < count, other=_NO_KEY), descending=True)
    bits = (key >> 32).to(tl.int32)
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(ids_out + places, ((key & _LAST_ID) ^ _LAST_ID).to(tl.int32), mask=places < K)
    tl.store(values_out + places, values, mask=places < K)
    return values, tl.sum(tl.where(places == K - 1, key, 0), axis=0)


@triton.jit
def _log(total: tl.tensor) -> tl.tensor:
    """Finite for no mass at all, for a row that will be in doubt."""
    return tl.log(tl.maximum(total, _LEAST_SUM))


@triton.jit
def finish(
    products: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    num_blocks: tl.tensor,
    inverse: tl.tensor,
    inverse_low: tl.tensor,
    found: tl.tensor,
    keys: tl.tensor,
    counts: tl.tensor,
    tops: tl.tensor,
    rest_totals: tl.tensor,
    ids_out: tl.tensor,
    values_out: tl.tensor,
    rest_sums: tl.tensor,
    logprobs_out: tl.tensor,
    tails_out: tl.tensor,
    doubtful: tl.tensor,
    K: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
) -> None:
    """A row's target without draws: the K greatest candidates, their log-probabilities and the
    tail's; the found blocks' sums without the kept entries; and whether the row is in doubt."""
    # the kept entries
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, C)
    count = tl.load(counts + row)
    at = row * K
    values, last = _rank(keys + row * C, count, ids_out + at, values_out + at, K, C)

    # what is not kept: entries whose key is below the last kept one
    top = tl.load(tops + row)
    base = tl.where(top == -float("inf"), 0.0, top)
    rest_total = tl.load(rest_totals + row)
    for start in range(0, K, CHUNK):
        which = start + tl.arange(0, CHUNK)
        blocks = tl.load(found + row * K + which, mask=which < K, other=0)
        z, ids, _ = _entries(
            products, row_stride, vocab_size, scale, softcap, row, blocks, which < K, B, HAS_SOFTCAP
        )
        kept = _key(_ordered(z), ids) >= last
        sums = tl.sum(tl.where(kept, 0.0, tl.exp((z - base) * inverse)), axis=1)
        tl.store(rest_sums + row * num_blocks + blocks, sums, mask=which < K)
        rest_total += tl.sum(sums.to(tl.float64), axis=0)

    # log-probabilities, relative to the greatest logit
    below = (values.to(tl.float64) - base) * (tl.zeros((), tl.float64) + inverse + inverse_low)
    kept_total = tl.sum(tl.where(places < K, tl.exp(below), 0.0), axis=0)
    log_sum = _log(kept_total + rest_total)
    tl.store(logprobs_out + at + places, (below - log_sum).to(tl.float32), mask=places < K)
    tl.store(tails_out + row, (_log(rest_total) - log_sum).to(tl.float32))

    # sure: room for all, a tail that float32 can tell, and no NaN or infinity
    is_finite = (tl.abs(top) < float("inf")) & (kept_total + rest_total < float("inf"))
    tl.store(doubtful + row, (is_finite & (count <= C) & (rest_total >= _LEAST_SUM)) == 0)


@triton.jit
def _random_bits(seed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """uint64: splitmix64 of the seed and the numbers from 1 on."""
    x = seed.to(tl.uint64) + _GOLDEN * index.to(tl.uint64)
    x = (x ^ (x >> 30)) * _FIRST_FACTOR
    x = (x ^ (x >> 27)) * _SECOND_FACTOR
    return x ^ (x >> 31)


@triton.jit
def _blocks_of(
    shares: tl.tensor,
    sums: tl.tensor,
    num_blocks: tl.tensor,
    M: tl.constexpr,
    S: tl.constexpr,
) -> tl.tensor:
    """The block in which each share of a row's mass ends, and the fraction of the block before it.

    First the S blocks among which it is, then the block, so that no draw looks at every block.
    """
    # whole numbers for the blocks' masses
    groups = tl.arange(0, M // S)
    blocks = groups[:, None] * S + tl.arange(0, S)[None, :]
    rest = tl.load(sums + blocks, mask=blocks < num_blocks, other=0.0).to(tl.float64)
    unit = _ROW_MASS / tl.sum(tl.sum(rest, axis=1), axis=0)
    up_to = tl.cumsum(tl.sum((rest * unit).to(tl.int64), axis=1), axis=0)
    places = shares * tl.max(up_to, axis=0).to(tl.float64)

    # the S blocks
    passed = up_to[None, :] <= places.to(tl.int64)[:, None]
    first = tl.minimum(tl.sum(passed.to(tl.int32), axis=1), M // S - 1) * S
    before = tl.max(tl.where(passed, up_to[None, :], 0), axis=1)

    # the block
    among = first[:, None] + tl.arange(0, S)[None, :]
    masses = tl.load(sums + among, mask=among < num_blocks, other=0.0).to(tl.float64) * unit
    up_to = before[:, None] + tl.cumsum(masses.to(tl.int64), axis=1)
    passed = up_to <= places.to(tl.int64)[:, None]
    block = tl.minimum(first + tl.sum(passed.to(tl.int32), axis=1), num_blocks - 1)
    before = tl.maximum(before, tl.max(tl.where(passed, up_to, 0), axis=1))
    mass = (tl.load(sums + block).to(tl.float64) * unit).to(tl.int64)
    return block, (places - before.to(tl.float64)) / mass.to(tl.float64)


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
) -> None:
    """D draws of a row from the ids that are not kept, as `draws.draw_in_blocks` makes them."""
    # the place of each draw: its block, and the fraction of the block's mass before it
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * D + tl.arange(0, D)
    random = (_random_bits(tl.load(seeds + row), index + 1) >> 11).to(tl.float64) * _ULP_OF_ONE
    below_one = tl.full((D,), _BELOW_ONE, tl.float64)
    shares = tl.minimum((index.to(tl.float64) + random) / num_draws, below_one)
    sums_at = rest_sums + row * num_blocks
    blocks, fractions = _blocks_of(shares, sums_at, num_blocks, M, M if M < 64 else 64)
    fractions = tl.minimum(tl.maximum(fractions, 0.0), below_one)

    # the block's entries that are not kept, and the id at the same fraction of their mass
    z, ids, _ = _entries(
        products, row_stride, vocab_size, scale, softcap, row, blocks, index >= 0, B, HAS_SOFTCAP
    )
    if K > 0:
        least, last = tl.load(values_in + row * K + K - 1), tl.load(ids_in + row * K + K - 1)
        kept = (z > least) | ((z == least) & (ids <= last))
        z = tl.where(kept, -float("inf"), z)
    peaks = tl.max(z, axis=1)
    peaks = tl.where(peaks == -float("inf"), 0.0, peaks)
    weights = tl.exp((z - peaks[:, None]) * inverse).to(tl.float64)
    within = tl.cumsum((weights * _GREATEST_MASS).to(tl.int64), axis=1)
    total = tl.max(within, axis=1)
    wanted = (fractions * total.to(tl.float64)).to(tl.int64)
    offset = tl.sum((within <= wanted[:, None]).to(tl.int32), axis=1)
    drawn = tl.minimum(blocks * B + offset, vocab_size - 1)
    tl.store(draws_out + row * num_draws + index, drawn, mask=index < num_draws)
