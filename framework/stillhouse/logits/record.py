"""What a record is: one target as bytes of a fixed size, and for each target exactly one record.

Here is all that decides a byte or refuses one: sizes, the curve of the values, and what no encoder
writes. `codec_numpy` and `codec_torch` write and read records by it. What takes an `Array` is in
operators that numpy's arrays and torch's tensors share.

Shapes: T tokens, K exact head entries, N tail draws, V vocabulary, M = K or N.

A record's sections follow one another without gaps, each starting on a byte. All numbers are
little-endian. A "bit stream" fills each byte from its least significant bit upwards; the bits after
its last one, up to the end of the byte, are 0.

    header    4 bytes, when K > 0     R and log p_tail, two IEEE 754 binary16 numbers ids       E(K)
    bytes, when K > 0  the K kept ids, strictly ascending, in Elias-Fano form values    ceil(K bits
    / 8) bytes  the K codes as a bit stream, `bits` = 6 or 8 bits each, in the order of the ids
    draws     E(N) bytes, when N > 0  the N drawn ids, ascending with repeats allowed, in Elias-Fano
    form

Elias-Fano form of M ascending ids below V: with l = max(0, floor(log2(V / M))), first a bit stream
of the l low bits of each id, least significant bit first; then a bit stream of M + ((V - 1) >> l) +
1 bits in which bit (id >> l) + i is 1 for the i-th id (from 0) and every other bit is 0. E(M) =
ceil(M l / 8) + ceil((M + ((V - 1) >> l) + 1) / 8). (Elias 1974; Fano 1971.)

Values are natural-log drops d = logprob_best - logprob below the best kept entry, on a square-root
scale that is finest where the probability is: r(d) = sqrt(1 + d) - 1. With L = 2^bits - 1, the
encoder writes the code c = round(L min(r(d) / r(R), 1)), halves to even, where R =
binary16(min(max(largest d, 1), 40)). A code stands for d = x (2 + x) with x = r(R) c / L. So the
best entry's code is 0, and the largest code is L unless R = 1. Entries more than 40 nats below the
best, those of probability 0 included, are written as 40 below: an error in p of at most 4.3e-18.
(Under the root, 1 + d rather than d spends fewer codes on differences too small to matter: a third
less KL at the same bytes on power-law rows.)

log p_tail is the log of the mass outside the kept ids, rounded to binary16: -inf where that mass is
exactly 0 (always when K = V), else limited to [-65504, -2^-24] so that the kept entries never
decode to no mass at all. The kept entries share 1 - p_tail:

    logprob_best = log(1 - p_tail) - log(sum over kept exp(-d))        logprob = logprob_best - d

Without kept entries (K = 0) there is neither header nor values, and log p_tail is 0. Codes, ids and
header that no encoder writes are refused, so an accepted record is exactly what its own decoded
target encodes to.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

import numpy.typing as npt
from torch import Tensor

from stillhouse.errors import ChunkError, ConfigError

CODEC_VERSION = 1

HEADER_BYTES = 4
# nats; finer steps than this one's would drown in the rounding of float32 log-probabilities
LEAST_RANGE = 1.0
MOST_RANGE = 40.0  # nats
LEAST_LOG_TAIL = -65504.0  # binary16's most negative finite number
MOST_LOG_TAIL = -(2.0**-24)  # binary16's negative number nearest to 0
_ROUNDING = 1e-3  # a log tail mass above 0 by no more than this is the rounding of a full tail

Array = TypeVar("Array", npt.NDArray[Any], Tensor)
# each with the rows, a boolean array or tensor [T], that it is true of
Complaints = list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Codec:
    """Everything that fixes a record's layout, and the temperature that its numbers are of. Raises
    ConfigError for an impossible one."""

    vocab_size: int
    k: int
    _: KW_ONLY
    num_draws: int = 0
    value_bits: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.vocab_size:
            raise ConfigError(
                f"k is {self.k} with a vocabulary of {self.vocab_size}; set k between 0 and "
                f"{self.vocab_size}"
            )
        if self.num_draws < 0 or self.k + self.num_draws == 0:
            raise ConfigError(
                f"a target of k = {self.k} entries and {self.num_draws} tail draws says nothing; "
                "keep or draw at least one id"
            )
        if self.value_bits not in (6, 8):
            raise ConfigError(f"value_bits is {self.value_bits}; set it to 6 or 8")
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; set a finite number above 0")

    @property
    def name(self) -> str:
        return f"ef-sqrt{self.value_bits}"

    @property
    def bytes_per_token(self) -> int:
        return sum(self.section_bytes)

    @property
    def section_bytes(self) -> tuple[int, int, int, int]:
        """Bytes of header, ids, values and draws."""
        ids, draws = (sum(elias_fano_bytes(m, self.vocab_size)) for m in (self.k, self.num_draws))
        return HEADER_BYTES if self.k else 0, ids, -(-self.k * self.value_bits // 8), draws

    @property
    def most_code(self) -> int:
        return (1 << self.value_bits) - 1


# Ids
# ------------------------------------------------------------------------------------------------


def low_bits(m: int, vocab_size: int) -> int:
    """How many bits of each of m ids are written as they are."""
    return max(0, (vocab_size // m).bit_length() - 1)


def elias_fano_bytes(m: int, vocab_size: int) -> tuple[int, int]:
    """Bytes of the low and of the high bits of m ids."""
    if m == 0:
        return 0, 0
    low = low_bits(m, vocab_size)
    return -(-m * low // 8), -(-(m + ((vocab_size - 1) >> low) + 1) // 8)


# Values
# ------------------------------------------------------------------------------------------------


def codes_of(roots_TK: Array, range_root_T1: Array, codec: Codec) -> Array:
    """The codes, as whole numbers in float32, of drops d below R: of r(d) and r(R), which come as
    the float32 nearest to them."""
    codes_TK: Array = ((roots_TK / range_root_T1).clip(max=1) * codec.most_code).round()
    return codes_TK


def drops_of(codes_TK: Array, range_root_T1: Array, codec: Codec) -> Array:
    """The drops that codes stand for, in float64 as they and r(R) come."""
    roots_TK = range_root_T1 * (codes_TK / codec.most_code)
    return roots_TK * (2 + roots_TK)


# What is refused. A row is refused for its first complaint, in the order of a record's sections.
# ----------------------------------------


def wrong_target(best_T: Array, log_tail_T: Array, codec: Codec) -> Complaints:
    """Of a target's best log-probability and its tail before they are written."""
    complaint = "would hold log-probabilities of no distribution"
    return [
        (complaint, ~(abs(best_T) < math.inf)),
        (complaint, _no_tail(log_tail_T, codec, most=_ROUNDING)),
    ]


def wrong_header(range_T: Array, log_tail_T: Array, codec: Codec) -> Complaints:
    """Of R and log p_tail as they were read."""
    return [
        (
            f"has a range outside {LEAST_RANGE}..{MOST_RANGE}",
            ~((range_T >= LEAST_RANGE) & (range_T <= MOST_RANGE)),
        ),
        ("has a tail mass that is no probability", _no_tail(log_tail_T, codec, most=MOST_LOG_TAIL)),
    ]


def wrong_number(num_ones_T: Array, m: int) -> Complaints:
    """Of the ones among the high bits of m ids."""
    return [(f"has another number of ids than {m}", num_ones_T != m)]


def wrong_ids(ids_TM: Array, codec: Codec, *, distinct: bool) -> Complaints:
    """Of kept ids, which are distinct, or of draws."""
    return [
        (
            "has ids out of order" + (", or one of them twice" if distinct else ""),
            (ids_TM[:, 1:] < ids_TM[:, :-1] + distinct).any(1),
        ),
        (
            f"has ids outside 0..{codec.vocab_size - 1}",
            (ids_TM[:, 0] < 0) | (ids_TM[:, -1] >= codec.vocab_size),
        ),
    ]


def wrong_end(section_TB: Array, num_bits: int) -> Complaints:
    """Of the last byte of a bit stream."""
    used = num_bits % 8
    return (
        [("has bits set after the last value of a section", (section_TB[:, -1] >> used) != 0)]
        if used
        else []
    )


def wrong_codes(codes_TK: Array, range_T: Array, codec: Codec) -> Complaints:
    """Of the codes in ascending order, and of R."""
    return [
        ("has no best entry", codes_TK[:, 0] != 0),
        (
            "has values that do not fill their range",
            (codes_TK[:, -1] != codec.most_code) & (range_T != LEAST_RANGE),
        ),
    ]


def refusal(row: int, complaint: str) -> ChunkError:
    return ChunkError(
        f"the record of row {row} {complaint}; it is damaged or of another recipe, and has to be "
        "made anew"
    )


def _no_tail(log_tail_T: Array, codec: Codec, *, most: float) -> Array:
    """Beside a whole vocabulary there is no tail; else its mass is a probability."""
    return log_tail_T != -math.inf if codec.k == codec.vocab_size else ~(log_tail_T <= most)
