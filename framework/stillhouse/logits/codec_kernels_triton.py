"""The kernels of `codec_triton`: a program writes or reads R records, whatever they hold.

`record` defines the bytes. Only whole numbers, sorting, and operations that round to nearest
(+, -, *, /, square root) decide a byte, and each operation rounds: launch the kernels with
`enable_fp_fusion=False`, since a fused multiply-add rounds once where the definition rounds twice.
Exponentials and logarithms come after that, in float64.

Arguments are pointers to contiguous tensors; one that the target does not have is not read. A
record is marked as wrong if a rule of `record` is broken. Functions for kept entries have rows of
addresses [R], and `first`, the place of each row's first entry.
"""

import triton
import triton.language as tl

from stillhouse.logits import record
from stillhouse.logits.codec_streams_triton import (
    any_of,
    id_bytes,
    load_fields,
    load_ids,
    room_for,
    store_fields,
    store_ids,
    torn_draws,
    wrong_end,
)

_LEAST_RANGE = tl.constexpr(record.LEAST_RANGE)
_MOST_RANGE = tl.constexpr(record.MOST_RANGE)
_LEAST_LOG_TAIL = tl.constexpr(record.LEAST_LOG_TAIL)
_MOST_LOG_TAIL = tl.constexpr(record.MOST_LOG_TAIL)
_MOST_ENTROPY = tl.constexpr(record.MOST_ENTROPY)
_ROUNDING = tl.constexpr(record.ROUNDING)
_MOST_DRAW_CODE = tl.constexpr(record.MOST_DRAW_CODE)
_DRAW_RANGE_ROOT = tl.constexpr(record.DRAW_RANGE_ROOT)
_DRAW_STEP = tl.constexpr(record.DRAW_RANGE_ROOT / record.MOST_DRAW_CODE)
_NEAR_ZERO = tl.constexpr(-0.6875)  # about log(1/2), and a number of float32 too
_WHOLE = tl.constexpr(2.0**23)  # float32 has whole numbers only from here on
_LAST_KEY = tl.constexpr(2**63 - 1)


# Numbers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _root(drops: tl.tensor) -> tl.tensor:
    """r(d) in float32."""
    return tl.sqrt_rn(1.0 + drops) - 1.0


@triton.jit
def _codes(drops: tl.tensor, range_root: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """Drops quantised to 0..MOST, halves to even, int32."""
    share = tl.minimum(tl.div_rn(_root(drops), range_root), 1.0)
    return ((share * MOST + _WHOLE) - _WHOLE).to(tl.int32)


@triton.jit
def _range_root(half_range: tl.tensor) -> tl.tensor:
    """r(R) in float64."""
    return tl.sqrt(1.0 + half_range.to(tl.float64)) - 1.0


@triton.jit
def _drops(codes: tl.tensor, range_root: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """The drops that codes of 0..MOST stand for, float64, as r(R) is."""
    roots = range_root * (codes.to(tl.float64) / MOST)
    return roots * (2.0 + roots)


@triton.jit
def _log_one_minus_exp(x: tl.tensor) -> tl.tensor:
    """log(1 - e^x) of float64 numbers below 0, accurate at both ends.

    By exp and log alone: Kahan's forms of e^x - 1 and of log(1 + y), in which the rounding of e^x
    and of 1 + y cancels (Higham 2002, "Accuracy and Stability of Numerical Algorithms", 1.14).
    """
    # 1 - e^x from the rounded e^x, where x is near 0
    near = tl.maximum(x, _NEAR_ZERO)
    power = tl.exp(near)
    of_near = tl.log((1.0 - power) * (near / tl.log(power)))
    # log(1 + y), y = -e^x, from the rounded 1 + y, elsewhere
    power = tl.exp(x)
    left = 1.0 - power
    rounded = tl.where(left == 1.0, 1.0, 1.0 - left)
    of_far = tl.where(left == 1.0, -power, tl.log(left) * (power / rounded))
    return tl.where(x > _NEAR_ZERO, of_near, of_far)


@triton.jit
def _store_half(at: tl.tensor, number: tl.tensor) -> None:
    """A float32 number as binary16."""
    bits = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(at, (bits & 0xFF).to(tl.uint8))
    tl.store(at + 1, ((bits >> 8) & 0xFF).to(tl.uint8))


@triton.jit
def _load_half(at: tl.tensor) -> tl.tensor:
    """The inverse of `_store_half`."""
    bits = tl.load(at).to(tl.int32) | (tl.load(at + 1).to(tl.int32) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _limited(logprob: tl.tensor) -> tl.tensor:
    """What the header and a label can hold, but for -inf."""
    return tl.minimum(tl.maximum(logprob, _LEAST_LOG_TAIL), _MOST_LOG_TAIL)


@triton.jit
def _within(number: tl.tensor, least: tl.constexpr, most: tl.constexpr) -> tl.tensor:
    """False for NaN too."""
    return (number >= least) & (number <= most)


@triton.jit
def _wrong_tail(
    log_tail: tl.tensor, most: tl.constexpr, V: tl.constexpr, K: tl.constexpr
) -> tl.tensor:
    return log_tail != -float("inf") if K == V else (log_tail <= most) == 0


# Kept entries
# ------------------------------------------------------------------------------------------------


@triton.jit
def _encode_kept(
    at: tl.tensor,
    ids: tl.tensor,
    logprobs: tl.tensor,
    first: tl.tensor,
    log_tail: tl.tensor,
    V: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Header, ids and values. The best log-probability and the nats that the least entry decodes
    below it, float32, and whether the entries are wrong."""
    # drops below the best entry
    place = tl.arange(0, room_for(K))[None, :]
    exist, places = place < K, first[:, None] + place
    logprob = tl.load(logprobs + places, mask=exist, other=-float("inf"))
    best = tl.max(logprob, axis=1)
    drops = tl.where(exist, tl.minimum(best[:, None] - logprob, _MOST_RANGE), 0.0)
    wrong = any_of(logprob != logprob) | ((tl.abs(best) < float("inf")) == 0)
    wrong |= _wrong_tail(log_tail, _ROUNDING, V, K)

    # header
    half_range = tl.maximum(tl.max(drops, axis=1), _LEAST_RANGE).to(tl.float16).to(tl.float32)
    _store_half(at, half_range)
    _store_half(at + 2, tl.where(log_tail == -float("inf"), log_tail, _limited(log_tail)))

    # ids ascending, values in their order
    MOST: tl.constexpr = (1 << BITS) - 1
    codes = _codes(drops, _root(half_range)[:, None], MOST)
    keys = (tl.load(ids + places, mask=exist, other=0).to(tl.int64) << BITS) | codes
    keys = tl.sort(tl.where(exist, keys, _LAST_KEY))
    wrong |= store_ids(at + 4, (keys >> BITS).to(tl.int32), V, K, True)
    store_fields(at + 4 + id_bytes(K, V), (keys & MOST).to(tl.int32), K, BITS)

    # the least entry as it decodes
    least = _drops(tl.max(codes, axis=1), _range_root(half_range), MOST).to(tl.float32)
    return best, least, wrong


@triton.jit
def _decode_kept(
    at: tl.tensor,
    ids_out: tl.tensor,
    logprobs_out: tl.tensor,
    first: tl.tensor,
    tail_out: tl.tensor,
    V: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """The inverse of `_encode_kept`. The least log-probability in float64, and whether the record
    is wrong."""
    # header
    half_range, log_tail = _load_half(at), _load_half(at + 2)
    tl.store(tail_out, log_tail)
    wrong = _within(half_range, _LEAST_RANGE, _MOST_RANGE) == 0
    wrong |= _wrong_tail(log_tail, _MOST_LOG_TAIL, V, K)

    # ids and codes, by code ascending, ties by id ascending
    ids, wrong_ids = load_ids(at + 4, V, K, True)
    at_values = at + 4 + id_bytes(K, V)
    place = tl.arange(0, room_for(K))[None, :]
    exist, places = place < K, first[:, None] + place
    keys = (load_fields(at_values, K, BITS) << 32) | (ids & 0xFFFFFFFF)
    keys = tl.sort(tl.where(exist, keys, _LAST_KEY))
    codes = tl.where(exist, keys >> 32, 0).to(tl.int32)
    tl.store(ids_out + places, keys.to(tl.int32), mask=exist)
    MOST: tl.constexpr = (1 << BITS) - 1
    largest = tl.max(codes, axis=1)
    wrong |= wrong_ids | wrong_end(at_values, K * BITS)
    wrong |= any_of((place == 0) & (codes != 0))
    wrong |= (largest != MOST) & (half_range != _LEAST_RANGE)

    # log-probabilities such that kept entries and tail sum to 1
    range_root = _range_root(half_range)
    drops = _drops(codes, range_root[:, None], MOST)
    total = tl.sum(tl.where(exist, tl.exp(-drops), 0.0), axis=1)
    best = _log_one_minus_exp(log_tail.to(tl.float64)) - tl.log(total)
    tl.store(logprobs_out + places, (best[:, None] - drops).to(tl.float32), mask=exist)
    return best - _drops(largest, range_root, MOST), wrong


# Records
# ------------------------------------------------------------------------------------------------


@triton.jit
def _rows(num_records: tl.tensor, R: tl.constexpr) -> tl.tensor:
    """The rows of this program's records. Beyond the last one, it is that one again: the same bytes
    are written twice."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    return tl.minimum(row, num_records - 1)


@triton.jit(do_not_specialize=["num_records"])
def encode(
    records: tl.tensor,
    num_records: tl.tensor,
    num_bytes: tl.tensor,
    wrongs: tl.tensor,
    ids: tl.tensor,
    logprobs: tl.tensor,
    log_tails: tl.tensor,
    draws: tl.tensor,
    draw_logprobs: tl.tensor,
    labels: tl.tensor,
    entropies: tl.tensor,
    V: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    N: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LABEL: tl.constexpr,
    ENTROPY: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """A target as a record."""
    # the kept entries
    row = _rows(num_records, R)
    at = records + row * num_bytes
    best, least = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    wrong = tl.zeros((R,), tl.int1)
    if K > 0:
        log_tail = tl.load(log_tails + row)
        best, least, wrong = _encode_kept(at, ids, logprobs, row * K, log_tail, V, K, BITS)
        at += 4 + id_bytes(K, V) + triton.cdiv(K * BITS, 8)

    # draws
    place = tl.arange(0, room_for(N))[None, :]
    exist, places = place < N, row[:, None] * N + place
    if N > 0:
        drawn = tl.load(draws + places, mask=exist, other=0)
        wrong |= store_ids(at, drawn, V, N, False)
        at += id_bytes(N, V)
    if WEIGHTED:
        logprob = tl.load(draw_logprobs + places, mask=exist, other=0.0)
        wrong |= any_of((logprob <= _ROUNDING) == 0) | torn_draws(drawn, logprob, N)
        below = tl.minimum(tl.maximum((best[:, None] - logprob) - least[:, None], 0.0), _MOST_RANGE)
        codes = _codes(below, tl.full((1, 1), _DRAW_RANGE_ROOT, tl.float32), _MOST_DRAW_CODE)
        tl.store(at[:, None] + place, codes.to(tl.uint8), mask=exist)
        at += N

    # the label, and the tail's entropy, of which -0 becomes 0
    if LABEL:
        label = tl.load(labels + row)
        wrong |= (label <= _ROUNDING) == 0
        _store_half(at, _limited(label))
        at += 2
    if ENTROPY:
        entropy = tl.load(entropies + row)
        wrong |= _within(entropy, 0.0, _MOST_ENTROPY) == 0
        _store_half(at, tl.where(entropy == 0.0, 0.0, entropy))
    tl.store(wrongs + row, wrong)


@triton.jit(do_not_specialize=["num_records"])
def decode(
    records: tl.tensor,
    num_records: tl.tensor,
    num_bytes: tl.tensor,
    wrongs: tl.tensor,
    ids: tl.tensor,
    logprobs: tl.tensor,
    log_tails: tl.tensor,
    draws: tl.tensor,
    draw_logprobs: tl.tensor,
    labels: tl.tensor,
    entropies: tl.tensor,
    V: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    N: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LABEL: tl.constexpr,
    ENTROPY: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """The inverse of `encode`; entries by log-probability descending, ties by id ascending."""
    # the kept entries
    row = _rows(num_records, R)
    at = records + row * num_bytes
    least, wrong = tl.zeros((R,), tl.float64), tl.zeros((R,), tl.int1)
    if K > 0:
        to_tail = log_tails + row
        least, wrong = _decode_kept(at, ids, logprobs, row * K, to_tail, V, K, BITS)
        at += 4 + id_bytes(K, V) + triton.cdiv(K * BITS, 8)
    else:
        tl.store(log_tails + row, tl.zeros((R,), tl.float32))

    # draws
    place = tl.arange(0, room_for(N))[None, :]
    exist, places = place < N, row[:, None] * N + place
    if N > 0:
        drawn, wrong_draws = load_ids(at, V, N, False)
        wrong |= wrong_draws
        tl.store(draws + places, drawn.to(tl.int32), mask=exist)
        at += id_bytes(N, V)
    if WEIGHTED:
        codes = tl.load(at[:, None] + place, mask=exist, other=0).to(tl.int32)
        wrong |= torn_draws(drawn, codes, N)
        roots = codes.to(tl.float64) * tl.full((1, 1), _DRAW_STEP, tl.float64)
        logprob = least[:, None] - roots * (2.0 + roots)
        tl.store(draw_logprobs + places, logprob.to(tl.float32), mask=exist)
        at += N

    # the label, and the tail's entropy, which is not -0
    if LABEL:
        label = _load_half(at)
        tl.store(labels + row, label)
        wrong |= _within(label, _LEAST_LOG_TAIL, _MOST_LOG_TAIL) == 0
        at += 2
    if ENTROPY:
        entropy = _load_half(at)
        tl.store(entropies + row, entropy)
        wrong |= (_within(entropy, 0.0, _MOST_ENTROPY) == 0) | (tl.load(at + 1) >= 0x80)
    tl.store(wrongs + row, wrong)
