"""Bit streams and ids of records in Triton, for the kernels of `codec_kernels_triton`.

A program has R records. Their M fields or ids are the first of P numbers a row, in registers; R and
P are powers of two. `at` are the addresses [R] of the R streams. No address depends on a number
that may be wrong.
"""

import triton
import triton.language as tl

from stillhouse.logits.spec import low_bits

_low_bits = triton.constexpr_function(low_bits)


@triton.constexpr_function
def _low_bytes(m: int, vocab_size: int) -> int:
    """`spec.elias_fano_bytes`, which Triton cannot call."""
    return int(-(-m * _low_bits(m, vocab_size) // 8))


@triton.constexpr_function
def _high_bytes(m: int, vocab_size: int) -> int:
    return int(-(-(m + ((vocab_size - 1) >> _low_bits(m, vocab_size)) + 1) // 8))


@triton.constexpr_function
def id_bytes(m: int, vocab_size: int) -> int:
    """Bytes of m ids in Elias-Fano form."""
    return int(_low_bytes(m, vocab_size) + _high_bytes(m, vocab_size))


@triton.constexpr_function
def room_for(m: int) -> int:
    """P for M = m; `tl.sort` needs two numbers."""
    return int(triton.next_power_of_2(max(m, 2)))


@triton.constexpr_function
def _levels(n: int) -> int:
    """Halvings that lead from n numbers to one."""
    return (n - 1).bit_length()


@triton.jit
def any_of(wrong: tl.tensor) -> tl.tensor:
    """bool [R] of bool [R, P]."""
    return tl.max(wrong.to(tl.int32), axis=1) != 0


# Fields
# ------------------------------------------------------------------------------------------------


@triton.jit
def _at(values: tl.tensor, places: tl.tensor) -> tl.tensor:
    """The values [R, P] at the same places [S] of each row; any value where P is too small."""
    R: tl.constexpr = values.shape[0]
    LAST: tl.constexpr = values.shape[1] - 1
    places = tl.minimum(places, LAST)[None, :]
    return tl.gather(values, tl.broadcast_to(places, (R, places.shape[1])), 1)


@triton.jit
def store_fields(at: tl.tensor, fields: tl.tensor, M: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """Fields of `WIDTH` bits each, int32 [R, P]. A byte is put together from the fields that it
    touches."""
    NUM_BYTES: tl.constexpr = triton.cdiv(M * WIDTH, 8)
    numbers = tl.arange(0, triton.next_power_of_2(NUM_BYTES))
    first, skipped = numbers * 8 // WIDTH, numbers * 8 % WIDTH
    packed = tl.where((first < M)[None, :], _at(fields, first), 0) >> skipped[None, :]
    for further in tl.static_range(1, triton.cdiv(WIDTH + 7, WIDTH)):
        field = tl.where((first + further < M)[None, :], _at(fields, first + further), 0)
        packed |= field << (further * WIDTH - skipped)[None, :]
    byte = (packed & 0xFF).to(tl.uint8)
    tl.store(at[:, None] + numbers[None, :], byte, mask=(numbers < NUM_BYTES)[None, :])


@triton.jit
def load_fields(at: tl.tensor, M: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """The inverse of `store_fields`, int64 [R, P]."""
    NUM_BYTES: tl.constexpr = triton.cdiv(M * WIDTH, 8)
    start = (tl.arange(0, room_for(M)) * WIDTH)[None, :]
    packed = tl.zeros((at.shape[0], room_for(M)), tl.int64)
    for further in tl.static_range(triton.cdiv(WIDTH + 7, 8)):
        number = start // 8 + further
        byte = tl.load(at[:, None] + number, mask=number < NUM_BYTES, other=0)
        packed |= byte.to(tl.int64) << (8 * further)
    return (packed >> (start % 8)) & ((1 << WIDTH) - 1)


@triton.jit
def wrong_end(at: tl.tensor, NUM_BITS: tl.constexpr) -> tl.tensor:
    """Whether bits are set after the last one of a stream."""
    last = tl.load(at + (NUM_BITS - 1) // 8).to(tl.int32)
    return (last >> ((NUM_BITS - 1) % 8 + 1)) != 0


# Ids
# ------------------------------------------------------------------------------------------------


@triton.jit
def _before(values: tl.tensor) -> tl.tensor:
    """The value before each one; the first one's is its own."""
    return _at(values, tl.maximum(tl.arange(0, values.shape[1]) - 1, 0))


@triton.jit
def _wrong_ids(
    ids: tl.tensor, V: tl.constexpr, M: tl.constexpr, DISTINCT: tl.constexpr
) -> tl.tensor:
    place = tl.arange(0, ids.shape[1])[None, :]
    descends = ids <= _before(ids) if DISTINCT else ids < _before(ids)
    outside = (ids < 0) | (ids >= V)
    return any_of((place < M) & (outside | ((place > 0) & descends)))


@triton.jit
def torn_draws(ids: tl.tensor, values: tl.tensor, M: tl.constexpr) -> tl.tensor:
    """Whether one drawn id has two values."""
    place = tl.arange(0, ids.shape[1])[None, :]
    repeated = (place > 0) & (place < M) & (ids == _before(ids))
    return any_of(repeated & (values != _before(values)))


@triton.jit
def store_ids(
    at: tl.tensor, ids: tl.tensor, V: tl.constexpr, M: tl.constexpr, DISTINCT: tl.constexpr
) -> tl.tensor:
    """Ascending ids, int32 [R, P], in Elias-Fano form; whether they are wrong."""
    # low bits
    place = tl.arange(0, ids.shape[1])[None, :]
    LOW: tl.constexpr = _low_bits(M, V)
    if LOW > 0:
        store_fields(at, ids & ((1 << LOW) - 1), M, LOW)

    # high bits: 32 to a word, then four bytes of each
    HIGH_BYTES: tl.constexpr = _high_bytes(M, V)
    ones = (ids >> LOW) + place
    bits = tl.where(place < M, tl.full(ones.shape, 1, tl.uint32) << (ones & 31).to(tl.uint32), 0)
    word = tl.arange(0, triton.next_power_of_2(triton.cdiv(HIGH_BYTES, 4)))
    here = (ones >> 5)[:, :, None] == word[None, None, :]
    words = tl.sum(tl.where(here, bits[:, :, None], 0), axis=1).to(tl.uint32)
    in_word = tl.arange(0, 4)[None, None, :]
    number = word[None, :, None] * 4 + in_word
    byte = (words[:, :, None] >> (8 * in_word).to(tl.uint32)) & 0xFF
    to = (at + _low_bytes(M, V))[:, None, None] + number
    tl.store(to, byte.to(tl.uint8), mask=number < HIGH_BYTES)
    return _wrong_ids(ids, V, M, DISTINCT)


@triton.jit
def _ones(at: tl.tensor, M: tl.constexpr, NUM_BYTES: tl.constexpr) -> tl.tensor:
    """The places of the first one bits of a stream, int32 [R, P], and the number of all [R]."""
    # ones up to each byte's end
    S: tl.constexpr = triton.next_power_of_2(NUM_BYTES)
    number = tl.arange(0, S)[None, :]
    byte = tl.load(at[:, None] + number, mask=number < NUM_BYTES, other=0).to(tl.int32)
    count = byte & 1
    for bit in tl.static_range(1, 8):
        count += (byte >> bit) & 1
    up_to = tl.cumsum(count, axis=1)

    # the byte of each one: the first up to whose end there are enough ones
    index = tl.arange(0, room_for(M))[None, :]
    which = tl.zeros((at.shape[0], room_for(M)), tl.int32)
    for level in tl.static_range(1, _levels(NUM_BYTES) + 1):
        last = which + ((S >> level) - 1)
        which += tl.where(tl.gather(up_to, last, 1) <= index, S >> level, 0)
    which = tl.minimum(which, NUM_BYTES - 1)

    # its place there: after all bits up to which there are too few ones
    byte = tl.load(at[:, None] + which).to(tl.int32)
    seen = tl.gather(up_to - count, which, 1)
    place = which * 8
    for bit in tl.static_range(8):
        seen += (byte >> bit) & 1
        place += (seen <= index).to(tl.int32)
    return place, tl.sum(count, axis=1)


@triton.jit
def load_ids(at: tl.tensor, V: tl.constexpr, M: tl.constexpr, DISTINCT: tl.constexpr) -> tl.tensor:
    """The inverse of `store_ids`: ids, int64 [R, P], and whether they are wrong."""
    LOW: tl.constexpr = _low_bits(M, V)
    ones, num_ones = _ones(at + _low_bytes(M, V), M, _high_bytes(M, V))
    ids = (ones - tl.arange(0, ones.shape[1])[None, :]).to(tl.int64) << LOW
    wrong = num_ones != M
    if LOW > 0:
        ids |= load_fields(at, M, LOW)
        wrong |= wrong_end(at, M * LOW)
    return ids, wrong | _wrong_ids(ids, V, M, DISTINCT)
