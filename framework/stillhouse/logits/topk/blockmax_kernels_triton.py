"""The kernels of `blockmax_triton`, which has their order, their sizes and the names of shapes.

Arguments are pointers to contiguous tensors, but for the products, whose rows are `row_stride`
apart. `rests` holds all rows' sums, then their moments, and `tails_out` log masses, then entropies.
`inverse` is 1 / temperature in float32, and `inverse_low` what float32 loses of it. What decides a
value of the target is computed in float64.

A first moment is the sum of x exp(x) over some ids, for the tail's entropy: x is (logit - base) /
temperature, where the base is the block's maximum, or the row's. What a target does not hold is
neither read nor written: HAS_ENTROPY and WEIGHTED say what it holds.
"""

import triton
import triton.language as tl

# An id XOR this one counts from the end, so that ties go to the lowest id.
_LAST_ID = tl.constexpr(2**31 - 1)
_NO_KEY = tl.constexpr(-(2**63))
LEAST_SUM = tl.constexpr(1e-30)  # relative to a row's maximum: below, float32 loses the digits
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_NO_MASS = tl.constexpr(-1000.0)  # an exponent whose power is 0, of 2 and of e


@triton.jit
def capped(z: tl.tensor, softcap: tl.tensor, HAS_SOFTCAP: tl.constexpr) -> tl.tensor:
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
def entries(
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
    z = tl.where(exist, capped(z * scale, softcap, HAS_SOFTCAP), -float("inf"))
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
    moments: tl.tensor,
    num_blocks: tl.tensor,
    inverse: tl.tensor,
    B: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
) -> None:
    """A tile of blocks: each one's greatest logit, sum of exp((logit - it) / temperature), and
    first moment.

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
        z = capped(z * scale, softcap, HAS_SOFTCAP)
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
    exponents = tl.fma(z, factor, -shared[:, None])
    powers = tl.exp2(exponents)
    total = tl.sum(powers, axis=1)
    at, exist = row * num_blocks + blocks, blocks < num_blocks
    if HAS_ENTROPY:
        moment = tl.sum(powers * tl.maximum(exponents, _NO_MASS), axis=1) - lost * total
        tl.store(moments + at, moment * (tl.exp2(-lost) * _LN_2), mask=exist)
    if not HAS_SOFTCAP:
        top *= scale
    tl.store(maxima + at, top, mask=exist)
    tl.store(sums + at, total * tl.exp2(-lost), mask=exist)


@triton.jit
def _reached(rank: tl.tensor, K: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """uint32: a number that at least K ranks reach, from its highest bit down: the greatest, or the
    first that exactly K reach."""
    threshold = tl.zeros((), tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    num_left = tl.full((), BITS, tl.int32)
    while num_left > 0:
        candidate = threshold | bit
        num_reaching = tl.sum((rank >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(num_reaching >= K, candidate, threshold)
        bit = bit >> 1
        num_left = tl.where(num_reaching == K, 0, num_left - 1)
    return threshold


@triton.jit
def pick(
    maxima: tl.tensor,
    sums: tl.tensor,
    moments: tl.tensor,
    num_blocks: tl.tensor,
    inverse: tl.tensor,
    found: tl.tensor,
    least: tl.tensor,
    tops: tl.tensor,
    rest_sums: tl.tensor,
    rests: tl.tensor,
    K: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
) -> None:
    """The K blocks with the greatest maxima, the K-th maximum, and the sums and moments of the
    other blocks, which keep no entry.

    Maxima differ in the highest `BITS` bits of their order alone, and M is less than 2^15.
    """
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, M)
    exist = blocks < num_blocks
    maximum = tl.load(maxima + row * num_blocks + blocks, mask=exist, other=-float("inf"))
    total = tl.load(sums + row * num_blocks + blocks, mask=exist, other=0.0)

    # as unsigned numbers, in which a block that is not there is the least
    order = tl.where(exist, _ordered(maximum), -(2**31))
    rank = order.to(tl.uint32, bitcast=True) ^ (1 << 31)
    threshold = _reached(rank, K, BITS)

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
    tl.store(rests + row, tl.sum(left.to(tl.float64), axis=0))
    if HAS_ENTROPY:
        moment = tl.load(moments + row * num_blocks + blocks, mask=exist, other=0.0)
        lower = tl.maximum((maximum - base) * inverse, _NO_MASS)
        moved = tl.where(taken, 0.0, weight * (moment + lower * total))
        tl.store(rests + tl.num_programs(0) + row, tl.sum(moved.to(tl.float64), axis=0))


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
        z, ids, exist = entries(
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
    return tl.log(tl.maximum(total, LEAST_SUM))


@triton.jit
def below(z: tl.tensor, base: tl.tensor, inverse: tl.tensor, inverse_low: tl.tensor) -> tl.tensor:
    """float64: (logit - base) / temperature."""
    return (z.to(tl.float64) - base) * (tl.zeros((), tl.float64) + inverse + inverse_low)


@triton.jit
def _left(
    products: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    row: tl.tensor,
    base: tl.tensor,
    inverse: tl.tensor,
    found: tl.tensor,
    last: tl.tensor,
    rest_sums: tl.tensor,
    num_kept: tl.tensor,
    rest: tl.tensor,
    K: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> tl.tensor:
    """The rest's sum and moment with the found blocks' entries that are not kept: those whose key
    is below the last kept one. Stores these blocks' sums, and how many entries of each are kept."""
    total = tl.load(rest)
    moment = tl.load(rest + tl.num_programs(0)) if HAS_ENTROPY else 0.0
    for start in range(0, K, CHUNK):
        # some of the found blocks after the others
        which = start + tl.arange(0, CHUNK)
        blocks = tl.load(found + which, mask=which < K, other=0)
        z, ids, _ = entries(
            products, row_stride, vocab_size, scale, softcap, row, blocks, which < K, B, HAS_SOFTCAP
        )
        kept = _key(_ordered(z), ids) >= last
        lower = (z - base) * inverse
        powers = tl.where(kept, 0.0, tl.exp(lower))
        sums = tl.sum(powers, axis=1)
        tl.store(rest_sums + blocks, sums, mask=which < K)
        total += tl.sum(sums.to(tl.float64), axis=0)
        if HAS_ENTROPY:
            moments = tl.sum(powers * tl.maximum(lower, _NO_MASS), axis=1)
            moment += tl.sum(moments.to(tl.float64), axis=0)
        if WEIGHTED:
            counts = tl.sum(kept.to(tl.int32), axis=1).to(tl.int16)
            tl.store(num_kept + blocks, counts, mask=which < K)
    return total, moment


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
    rests: tl.tensor,
    ids_out: tl.tensor,
    values_out: tl.tensor,
    rest_sums: tl.tensor,
    num_kept: tl.tensor,
    logprobs_out: tl.tensor,
    tails_out: tl.tensor,
    log_sums: tl.tensor,
    doubtful: tl.tensor,
    K: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> None:
    """A row's target without draws and label, what these need, and whether the row is in doubt."""
    # the kept entries
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, C)
    count = tl.load(counts + row)
    values, last = _rank(keys + row * C, count, ids_out + row * K, values_out + row * K, K, C)

    # what is not kept: entries whose key is below the last kept one
    top = tl.load(tops + row)
    base = tl.where(top == -float("inf"), 0.0, top)
    rest_total, rest_moment = _left(
        products, row_stride, vocab_size, scale, softcap, row, base, inverse, found + row * K,
        last, rest_sums + row * num_blocks, num_kept + row * num_blocks, rests + row,
        K, B, CHUNK, HAS_SOFTCAP, HAS_ENTROPY, WEIGHTED,
    )  # fmt: skip

    # log-probabilities, relative to the greatest logit
    lower = below(values, base, inverse, inverse_low)
    kept_total = tl.sum(tl.where(places < K, tl.exp(lower), 0.0), axis=0)
    log_sum = _log(kept_total + rest_total)
    tl.store(logprobs_out + row * K + places, (lower - log_sum).to(tl.float32), mask=places < K)
    tl.store(tails_out + row, (_log(rest_total) - log_sum).to(tl.float32))
    tl.store(log_sums + row, log_sum)
    if HAS_ENTROPY:
        entropy = _log(rest_total) - rest_moment / tl.maximum(rest_total, LEAST_SUM)
        tl.store(tails_out + tl.num_programs(0) + row, tl.maximum(entropy, 0.0).to(tl.float32))

    # sure: room for all, a tail that float32 can tell, and no NaN or infinity
    is_finite = (tl.abs(top) < float("inf")) & (kept_total + rest_total < float("inf"))
    tl.store(doubtful + row, (is_finite & (count <= C) & (rest_total >= LEAST_SUM)) == 0)
