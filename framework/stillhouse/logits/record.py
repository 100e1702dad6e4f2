"""The record: one target as bytes of a fixed size, with exactly one record for each target.

This file holds what decides a byte or refuses one: the curve of the values and the rules of
validity. `spec` has the sizes; `codec_numpy` and `codec_torch` write and read records. A function
over an `Array` takes numpy arrays and torch tensors alike, by the operators that they share.

Shapes: T tokens, K exact head entries, N tail draws, V vocabulary, M = K or N.

Layout
    A record's sections follow one another without gaps, each starting on a byte:

        header  4 bytes if K > 0              R and log p_tail, two IEEE 754 binary16 numbers
        ids     E(K) bytes if K > 0           the K kept ids, strictly ascending, in Elias-Fano form
        values  ceil(K bits / 8) bytes        the K codes as a bit stream of `value_bits` = 6 or 8
                                              bits each, in the order of the ids
        draws   E(N) bytes if N > 0           the N drawn ids, ascending with repeats allowed, in
                                              Elias-Fano form
        draw values  N bytes if weighted      a code for each draw, in the order of the draws
        label   2 bytes if there is one       log p of the token that follows, binary16
        tail entropy  2 bytes if there is one  in nats, binary16

    All numbers are little-endian. A bit stream fills each byte from its least significant bit
    upwards; the bits after its last one, up to the end of the byte, are 0.

Elias-Fano form (Elias 1974; Fano 1971)
    Of M ascending ids below V, with l = max(0, floor(log2(V / M))): first a bit stream of the l low
    bits of each id, least significant bit first; then a bit stream of M + ((V - 1) >> l) + 1 bits
    in which bit (id >> l) + i is 1 for the i-th id (from 0) and every other bit is 0. So
    E(M) = ceil(M l / 8) + ceil((M + ((V - 1) >> l) + 1) / 8).

Values
    Quantised are natural-log drops below the best kept entry, d = logprob_best - logprob, on a
    square-root scale that is finest where the probability is: r(d) = sqrt(1 + d) - 1. With
    L = 2^bits - 1, the encoder writes the code c = round(L min(r(d) / r(R), 1)), halves to even,
    where R = binary16(min(max(largest d, 1), 40)). A code stands for d = x (2 + x) with
    x = r(R) c / L. So the best entry's code is 0, and the largest code is L unless R = 1. Entries
    more than 40 nats below the best, those of probability 0 included, are written as 40 below: an
    error in p of at most 4.3e-18. (Under the root, 1 + d rather than d spends fewer codes on
    differences too small to matter: a third less KL at the same bytes on power-law rows.)

Tail
    log p_tail is the log of the mass outside the kept ids, rounded to binary16: -inf where that
    mass is exactly 0 (always when K = V), else limited to [-65504, -2^-24], so that the kept
    entries never decode to no mass at all. The kept entries share 1 - p_tail:

        logprob_best = log(1 - p_tail) - log(sum over kept exp(-d))
        logprob = logprob_best - d

    Without kept entries (K = 0) there is neither header nor values, and log p_tail is 0.

Values of draws
    A weighted draw is at or below the least kept entry, which decodes to d_K nats below the best.
    With e = logprob_best - logprob - d_K, held within 0 and 40, its code is
    round(255 r(e) / r(40)), halves to even: finest where the tail's mass is. Without kept entries
    logprob_best and d_K are 0. Two draws of one id have one code. (The rounding
    is of p by 1 % at the top of the tail and by 3 % five nats below, root mean square; drawing
    itself has an error of the order of 100 % a draw.)

Label and tail entropy
    The label's log-probability is held within [-65504, -2^-24]. The entropy of the distribution
    within the tail is from 0 to 65504, and 0 where the tail has no mass.

Codes, ids and headers that no encoder writes are refused, so an accepted record is exactly what its
own decoded target encodes to.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy.typing as npt
from torch import Tensor

from stillhouse.errors import ChunkError
from stillhouse.logits.spec import TargetSpec

LEAST_RANGE = 1.0  # nats; below it, steps would be finer than float32 log-probabilities are
MOST_RANGE = 40.0  # nats
LEAST_LOG_TAIL = -65504.0  # binary16's most negative finite number
MOST_LOG_TAIL = -(2.0**-24)  # binary16's negative number nearest to 0
MOST_ENTROPY = 65504.0  # binary16's largest finite number
MOST_DRAW_CODE = 255
# r(40) as a float32, so that float32 and float64 arithmetic begin with one number
DRAW_RANGE_ROOT = 5.4031243324279785
ROUNDING = 1e-3  # a log tail mass above 0 by no more than this is the rounding of a full tail

Array = TypeVar("Array", npt.NDArray[Any], Tensor)
# A rule in words, and the rows that break it: a boolean array or tensor [T]
Complaints = list[tuple[str, Any]]


# Values
# ------------------------------------------------------------------------------------------------


def codes_of(roots_TK: Array, range_root_T1: Array, spec: TargetSpec) -> Array:
    """Quantise drops d: whole numbers in float32, from r(d) and r(R) in float32."""
    codes_TK: Array = ((roots_TK / range_root_T1).clip(max=1) * spec.max_code).round()
    return codes_TK


def draw_codes_of(below_TN: Array, root_of: Callable[[Array], Array]) -> Array:
    """Quantise draws: whole numbers in float32, from the nats below the least kept entry, float32.

    `root_of` is r in float32.
    """
    roots_TN = root_of(below_TN.clip(0, MOST_RANGE))
    codes_TN: Array = ((roots_TN / DRAW_RANGE_ROOT).clip(max=1) * MOST_DRAW_CODE).round()
    return codes_TN


def draw_drops_of(codes_TN: Array) -> Array:
    """Dequantise draws: nats below the least kept entry, float64 like the codes."""
    roots_TN = codes_TN * (DRAW_RANGE_ROOT / MOST_DRAW_CODE)
    return roots_TN * (2 + roots_TN)


def drops_of(codes_TK: Array, range_root_T1: Array, spec: TargetSpec) -> Array:
    """Dequantise codes: the drops that they stand for, float64 like the codes and r(R)."""
    roots_TK = range_root_T1 * (codes_TK / spec.max_code)
    return roots_TK * (2 + roots_TK)


# Validity: a row is refused for its first complaint, in the order of a record's sections
# ------------------------------------------------------------------------------------------------


def wrong_target(best_T: Array, log_tail_T: Array, spec: TargetSpec) -> Complaints:
    """Before encoding: the best log-probability of a target, and its tail's."""
    complaint = "would hold log-probabilities of no distribution"
    return [
        (complaint, ~(abs(best_T) < math.inf)),
        (complaint, _wrong_tail(log_tail_T, spec, most=ROUNDING)),
    ]


def wrong_header(range_T: Array, log_tail_T: Array, spec: TargetSpec) -> Complaints:
    """After reading: R and log p_tail."""
    out_of_range_T = ~((range_T >= LEAST_RANGE) & (range_T <= MOST_RANGE))
    wrong_tail_T = _wrong_tail(log_tail_T, spec, most=MOST_LOG_TAIL)
    return [
        (f"has a range outside {LEAST_RANGE}..{MOST_RANGE}", out_of_range_T),
        ("has a tail mass that is no probability", wrong_tail_T),
    ]


def wrong_number(num_ones_T: Array, m: int) -> Complaints:
    """After reading: the number of ones among the high bits of m ids."""
    return [(f"has another number of ids than {m}", num_ones_T != m)]


def wrong_ids(ids_TM: Array, spec: TargetSpec, *, distinct: bool) -> Complaints:
    """Before encoding and after reading: kept ids, which are distinct, or draws."""
    unordered_T = (ids_TM[:, 1:] < ids_TM[:, :-1] + distinct).any(1)
    outside_T = (ids_TM[:, 0] < 0) | (ids_TM[:, -1] >= spec.vocab_size)
    return [
        ("has ids out of order" + (", or one of them twice" if distinct else ""), unordered_T),
        (f"has ids outside 0..{spec.vocab_size - 1}", outside_T),
    ]


def wrong_end(section_TB: Array, num_bits: int) -> Complaints:
    """After reading: the unused bits of the last byte of a bit stream."""
    used = num_bits % 8
    if not used:
        return []
    return [("has bits set after the last value of a section", (section_TB[:, -1] >> used) != 0)]


def wrong_codes(codes_TK: Array, range_T: Array, spec: TargetSpec) -> Complaints:
    """After reading: codes in ascending order, and R."""
    unfilled_T = (codes_TK[:, -1] != spec.max_code) & (range_T != LEAST_RANGE)
    return [
        ("has no best entry", codes_TK[:, 0] != 0),
        ("has values that do not fill their range", unfilled_T),
    ]


def wrong_draws(ids_TN: Any, logprobs_TN: Any) -> Complaints:
    """Before encoding: weighted draws and their log-probabilities."""
    torn_TN = (ids_TN[:, 1:] == ids_TN[:, :-1]) & (logprobs_TN[:, 1:] != logprobs_TN[:, :-1])
    return [
        ("would hold log-probabilities of no distribution", ~(logprobs_TN <= ROUNDING).all(1)),
        ("would hold one drawn id with two log-probabilities", torn_TN.any(1)),
    ]


def wrong_draw_codes(ids_TN: Any, codes_TN: Any) -> Complaints:
    """After reading: weighted draws and their codes."""
    torn_TN = (ids_TN[:, 1:] == ids_TN[:, :-1]) & (codes_TN[:, 1:] != codes_TN[:, :-1])
    return [("has one drawn id with two log-probabilities", torn_TN.any(1))]


def wrong_label(label_T: Array) -> Complaints:
    """After reading: the label's log-probability."""
    return [
        (
            "has a label's log-probability that is none",
            ~((label_T >= LEAST_LOG_TAIL) & (label_T <= MOST_LOG_TAIL)),
        )
    ]


def wrong_new_label(label_T: Array) -> Complaints:
    """Before encoding: the label's log-probability, -inf where p is 0."""
    return [("would hold a label's log-probability that is none", ~(label_T <= ROUNDING))]


def wrong_entropy(entropy_T: Array) -> Complaints:
    """Before encoding and after reading: the tail's entropy."""
    return [
        (
            "has a tail entropy that is none",
            ~((entropy_T >= 0) & (entropy_T <= MOST_ENTROPY)),
        )
    ]


def wrong_sign(section_T2: Array) -> Complaints:
    """After reading: the bytes of a tail entropy, which is not -0."""
    return [("has a tail entropy that is none", section_T2[:, 1] >= 0x80)]


def refusal(row: int, complaint: str) -> ChunkError:
    return ChunkError(
        f"the record of row {row} {complaint}; it is damaged or of another recipe, and has to be "
        "made anew"
    )


def _wrong_tail(log_tail_T: Array, spec: TargetSpec, *, most: float) -> Array:
    """Rows whose tail is not a probability, or not empty where the whole vocabulary is kept."""
    return log_tail_T != -math.inf if spec.k == spec.vocab_size else ~(log_tail_T <= most)
