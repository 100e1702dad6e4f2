"""The target as bytes: one record of fixed size for each token, and for each target exactly one record.

Shapes: T tokens, K exact head entries, N tail draws, V vocabulary, B bytes of a record, M = K or N.

A record's sections follow one another without gaps, each starting on a byte. All numbers are little-endian. A "bit stream" fills
each byte from its least significant bit upwards; the bits after its last one, up to the end of the byte, are 0.

    header    4 bytes, when K > 0     R and log p_tail, two IEEE 754 binary16 numbers
    ids       E(K) bytes, when K > 0  the K kept ids, strictly ascending, in Elias-Fano form
    values    ceil(K bits / 8) bytes  the K codes as a bit stream, `bits` = 6 or 8 bits each, in the order of the ids
    draws     E(N) bytes, when N > 0  the N drawn ids, ascending with repeats allowed, in Elias-Fano form

Elias-Fano form of M ascending ids below V: with l = max(0, floor(log2(V / M))), first a bit stream of the l low bits of each id, least
significant bit first; then a bit stream of M + ((V - 1) >> l) + 1 bits in which bit (id >> l) + i is 1 for the i-th id (from 0) and
every other bit is 0. E(M) = ceil(M l / 8) + ceil((M + ((V - 1) >> l) + 1) / 8). (Elias 1974; Fano 1971.)

Values are natural-log drops d = logprob_best - logprob below the best kept entry, on a square-root scale that is finest where the
probability is: r(d) = sqrt(1 + d) - 1. With L = 2^bits - 1, the encoder writes the code c = round(L min(r(d) / r(R), 1)), halves to even,
where R = binary16(min(max(largest d, 1), 40)). A code stands for d = x (2 + x) with x = r(R) c / L. So the best entry's code is 0, and
the largest code is L unless R = 1. Entries more than 40 nats below the best, those of probability 0 included, are written as 40 below:
an error in p of at most 4.3e-18. (Under the root, 1 + d rather than d spends fewer codes on differences too small to matter: a third
less KL at the same bytes on power-law rows.)

log p_tail is the log of the mass outside the kept ids, rounded to binary16: -inf where that mass is exactly 0 (always when K = V), else
limited to [-65504, -2^-24] so that the kept entries never decode to no mass at all. The kept entries share 1 - p_tail:

    logprob_best = log(1 - p_tail) - log(sum over kept exp(-d))        logprob = logprob_best - d

Without kept entries (K = 0) there is neither header nor values, and log p_tail is 0. Codes, ids and header that no encoder writes are
refused, so an accepted record is exactly what its own decoded target encodes to.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.errors import ChunkError, ConfigError
from stillhouse.logits.compressed import CompressedLogits

CODEC_VERSION = 1

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_HALF = np.dtype("<f2")
_HEADER_BYTES = 2 * _HALF.itemsize
_LEAST_RANGE = 1.0  # nats; finer steps than this one's would drown in the rounding of float32 log-probabilities
_MOST_RANGE = 40.0  # nats
_LEAST_LOG_TAIL = -65504.0  # binary16's most negative finite number
_MOST_LOG_TAIL = -(2.0**-24)  # binary16's negative number nearest to 0
_ROUNDING = 1e-3  # a log tail mass above 0 by no more than this is the rounding of a full tail
_BLOCK_ENTRIES = 1 << 16  # ids worked on at one time: bounds the memory, and stays in the cache


@dataclass(frozen=True, slots=True)
class Codec:
    """Everything that fixes a record's layout, and the temperature that its numbers are of. Raises ConfigError for an impossible one."""

    vocab_size: int
    k: int
    _: KW_ONLY
    num_draws: int = 0
    value_bits: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.vocab_size:
            raise ConfigError(f"k is {self.k} with a vocabulary of {self.vocab_size}; set k between 0 and {self.vocab_size}")
        if self.num_draws < 0 or self.k + self.num_draws == 0:
            raise ConfigError(
                f"a target of k = {self.k} entries and {self.num_draws} tail draws says nothing; keep or draw at least one id"
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
        return sum(_section_bytes(self))


def encode(c: CompressedLogits, codec: Codec) -> Tensor:
    """Records of the target's tokens: uint8 [T, codec.bytes_per_token], on the CPU.

    Raises ConfigError when the target has another shape than the codec, ChunkError naming the first row that cannot be written.
    """
    found = (c.vocab_size, c.k, c.num_draws, c.temperature)
    wanted = (codec.vocab_size, codec.k, codec.num_draws, codec.temperature)
    if found != wanted:
        raise ConfigError(
            f"a target of (vocabulary, k, draws, temperature) = {found} meets a codec of {wanted}; build both from one recipe"
        )
    ids_TK, draws_TN = (ids.cpu().numpy() for ids in (c.token_ids_TK, c.tail_ids_TN))
    logprobs_TK, log_tail_T = (values.cpu().numpy() for values in (c.logprobs_TK, c.tail_logmass_T))
    records_TB = np.empty((c.num_tokens, codec.bytes_per_token), np.uint8)
    for rows in _row_blocks(c.num_tokens, codec):
        kept = _encode_kept(ids_TK[rows], logprobs_TK[rows], log_tail_T[rows], codec=codec, first_row=rows.start) if codec.k else []
        drawn = _encode_draws(draws_TN[rows], codec=codec, first_row=rows.start) if codec.num_draws else []
        np.concatenate([*kept, *drawn], axis=1, out=records_TB[rows])
    return torch.from_numpy(records_TB)


def decode(records_TB: Tensor, codec: Codec) -> CompressedLogits:
    """The target that `records_TB` (uint8 [T, codec.bytes_per_token]) hold, on the CPU, by logprob descending, ties by id ascending.

    Raises ChunkError naming the first row that no encoder writes.
    """
    if records_TB.dtype != torch.uint8 or records_TB.ndim != 2 or records_TB.shape[1] != codec.bytes_per_token:
        raise ChunkError(
            f"records are {records_TB.dtype} {list(records_TB.shape)}, wanted uint8 [tokens, {codec.bytes_per_token}] for {codec}; "
            "read them with the codec of their recipe"
        )
    records, num_tokens = records_TB.cpu().numpy(), records_TB.shape[0]
    ids_TK = np.empty((num_tokens, codec.k), np.int32)
    logprobs_TK = np.empty((num_tokens, codec.k), np.float32)
    log_tail_T = np.zeros(num_tokens, np.float32)
    draws_TN = np.empty((num_tokens, codec.num_draws), np.int32)
    ends = list(accumulate(_section_bytes(codec)))
    for rows in _row_blocks(num_tokens, codec):
        header, ids, values, draws = np.split(records[rows], ends[:-1], axis=1)
        if codec.k:
            range_T, log_tail_T[rows] = _decode_header(header, codec=codec, first_row=rows.start)
            kept_TK = _decode_ids(ids, codec.k, vocab_size=codec.vocab_size, first_row=rows.start, distinct=True)
            codes_TK = _decode_codes(values, range_T, codec=codec, first_row=rows.start)
            ids_TK[rows], codes_TK = _sort_pairs(codes_TK, kept_TK)[::-1]
            logprobs_TK[rows] = _dequantise(codes_TK, range_T, log_tail_T[rows], value_bits=codec.value_bits)
        if codec.num_draws:
            draws_TN[rows] = _decode_ids(draws, codec.num_draws, vocab_size=codec.vocab_size, first_row=rows.start, distinct=False)
    return CompressedLogits(
        torch.from_numpy(ids_TK),
        torch.from_numpy(logprobs_TK),
        torch.from_numpy(log_tail_T),
        torch.from_numpy(draws_TN),
        vocab_size=codec.vocab_size,
        temperature=codec.temperature,
    )


def _section_bytes(codec: Codec) -> tuple[int, int, int, int]:
    ids, draws = (sum(_elias_fano_bytes(m, codec.vocab_size)) for m in (codec.k, codec.num_draws))
    return _HEADER_BYTES if codec.k else 0, ids, -(-codec.k * codec.value_bits // 8), draws


def _row_blocks(num_tokens: int, codec: Codec) -> Iterator[slice]:
    step = max(1, _BLOCK_ENTRIES // (codec.k + codec.num_draws))
    return (slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step))


# Elias-Fano ---------------------------------------------------------------------------------------------------------------------------


def _low_bits(m: int, vocab_size: int) -> int:
    return max(0, (vocab_size // m).bit_length() - 1)


def _elias_fano_bytes(m: int, vocab_size: int) -> tuple[int, int]:
    """Bytes of the low and of the high section of m ids."""
    if m == 0:
        return 0, 0
    low = _low_bits(m, vocab_size)
    return -(-m * low // 8), -(-(m + ((vocab_size - 1) >> low) + 1) // 8)


def _encode_ids(ids_TM: Ints, vocab_size: int) -> list[Bytes]:
    num_rows, m = ids_TM.shape
    low = _low_bits(m, vocab_size)
    high_bits = np.zeros((num_rows, 8 * _elias_fano_bytes(m, vocab_size)[1]), np.uint8)
    np.put_along_axis(high_bits, (ids_TM >> low) + np.arange(m), 1, axis=1)
    return [_pack(ids_TM, low), np.packbits(high_bits, axis=1, bitorder="little")]


def _decode_ids(section: Bytes, m: int, *, vocab_size: int, first_row: int, distinct: bool) -> Ints:
    low, low_bytes = _low_bits(m, vocab_size), _elias_fano_bytes(m, vocab_size)[0]
    high_bits = np.unpackbits(section[:, low_bytes:], axis=1, bitorder="little")
    ones_T = high_bits.sum(axis=1, dtype=np.int64)
    _refuse(ones_T != m, first_row, f"has another number of ids than {m}")
    num_rows, num_bits = high_bits.shape
    ones_TM = np.flatnonzero(high_bits.view(np.bool_)).reshape(num_rows, m) - num_bits * np.arange(num_rows)[:, None]
    ids_TM = ((ones_TM - np.arange(m)) << low) | _unpack(section[:, :low_bytes], m, width=low, first_row=first_row)
    _check_ids(ids_TM, vocab_size=vocab_size, first_row=first_row, distinct=distinct)
    return ids_TM


def _check_ids(ids_TM: Ints, *, vocab_size: int, first_row: int, distinct: bool) -> None:
    _refuse(ids_TM[:, 1:] < ids_TM[:, :-1] + distinct, first_row, "has ids out of order" + (", or one of them twice" if distinct else ""))
    _refuse((ids_TM[:, 0] < 0) | (ids_TM[:, -1] >= vocab_size), first_row, f"has ids outside 0..{vocab_size - 1}")


# Bit streams --------------------------------------------------------------------------------------------------------------------------


def _pack(values_TM: Ints, width: int) -> Bytes:
    """The `width` low bits of each value, least significant first, as uint8 [T, ceil(M * width / 8)]."""
    num_rows, m = values_TM.shape
    if width == 8:
        return values_TM.astype(np.uint8)
    bits = np.unpackbits(values_TM.astype("<u4", order="C").view(np.uint8), axis=1, bitorder="little").reshape(num_rows, m, 32)
    return np.packbits(bits[:, :, :width].reshape(num_rows, m * width), axis=1, bitorder="little")


def _unpack(section: Bytes, m: int, *, width: int, first_row: int) -> Ints:
    """The inverse of `_pack`. Refuses bits set after the last value."""
    num_rows = section.shape[0]
    if width == 8:
        return section.astype(np.int64)
    bits = np.unpackbits(section, axis=1, bitorder="little")
    _refuse(bits[:, m * width :] != 0, first_row, "has bits set after the last value of a section")
    words = np.zeros((num_rows, m, 32), np.uint8)
    words[:, :, :width] = bits[:, : m * width].reshape(num_rows, m, width)
    return np.packbits(words.reshape(num_rows, m * 32), axis=1, bitorder="little").view("<u4").astype(np.int64)


# Values -------------------------------------------------------------------------------------------------------------------------------


def _encode_kept(ids_TK: Ints, logprobs_TK: Floats, log_tail_T: Floats, *, codec: Codec, first_row: int) -> list[Bytes]:
    best_T = logprobs_TK.max(axis=1)
    wrong_tail_T = (log_tail_T != -np.inf) if codec.k == codec.vocab_size else ~(log_tail_T <= _ROUNDING)
    _refuse(~np.isfinite(best_T) | wrong_tail_T, first_row, "would hold log-probabilities of no distribution")
    drops_TK = np.minimum(best_T[:, None] - logprobs_TK, np.float32(_MOST_RANGE))
    range_T = np.maximum(drops_TK.max(axis=1), np.float32(_LEAST_RANGE)).astype(_HALF)
    shares_TK = np.minimum(_root(drops_TK) / _root(range_T.astype(np.float32))[:, None], 1)
    codes_TK = np.rint(shares_TK * np.float32(2**codec.value_bits - 1)).astype(np.int64)
    stored_tail_T = np.where(log_tail_T == -np.inf, -np.inf, np.clip(log_tail_T, _LEAST_LOG_TAIL, _MOST_LOG_TAIL)).astype(_HALF)
    header = np.stack([range_T, stored_tail_T], axis=1).view(np.uint8)
    ids_TK, codes_TK = _sort_pairs(ids_TK.astype(np.int64), codes_TK)
    _check_ids(ids_TK, vocab_size=codec.vocab_size, first_row=first_row, distinct=True)
    return [header, *_encode_ids(ids_TK, codec.vocab_size), _pack(codes_TK, codec.value_bits)]


def _encode_draws(draws_TN: Ints, *, codec: Codec, first_row: int) -> list[Bytes]:
    _check_ids(draws_TN, vocab_size=codec.vocab_size, first_row=first_row, distinct=False)
    return _encode_ids(draws_TN, codec.vocab_size)


def _decode_header(header: Bytes, *, codec: Codec, first_row: int) -> tuple[Floats, Floats]:
    range_T, log_tail_T = np.ascontiguousarray(header).view(_HALF).astype(np.float32).T
    _refuse(~((range_T >= _LEAST_RANGE) & (range_T <= _MOST_RANGE)), first_row, f"has a range outside {_LEAST_RANGE}..{_MOST_RANGE}")
    wrong_T = (log_tail_T != -np.inf) if codec.k == codec.vocab_size else ~(log_tail_T <= _MOST_LOG_TAIL)
    _refuse(wrong_T, first_row, "has a tail mass that is no probability")
    return range_T, log_tail_T


def _decode_codes(section: Bytes, range_T: Floats, *, codec: Codec, first_row: int) -> Ints:
    codes_TK = _unpack(section, codec.k, width=codec.value_bits, first_row=first_row)
    _refuse(codes_TK.min(axis=1) != 0, first_row, "has no best entry")
    short_T = (codes_TK.max(axis=1) != 2**codec.value_bits - 1) & (range_T != _LEAST_RANGE)
    _refuse(short_T, first_row, "has values that do not fill their range")
    return codes_TK


def _dequantise(codes_TK: Ints, range_T: Floats, log_tail_T: Floats, *, value_bits: int) -> Floats:
    roots_TK = _root(range_T)[:, None] * (codes_TK.astype(np.float32) / np.float32(2**value_bits - 1))
    drops_TK = roots_TK * (2 + roots_TK)
    best_T = _log_one_minus_exp(log_tail_T.astype(np.float64)) - np.log(np.exp(-drops_TK).sum(axis=1, dtype=np.float64))
    return best_T.astype(np.float32)[:, None] - drops_TK


def _root(drops: Floats) -> Floats:
    return np.sqrt(1 + drops) - 1


def _log_one_minus_exp(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log(1 - e^x) for x < 0, accurate at both ends (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    near_zero = np.maximum(x, -np.log(2))
    return np.where(x > -np.log(2), np.log(-np.expm1(near_zero)), np.log1p(-np.exp(x)))


def _sort_pairs(first_TM: Ints, second_TM: Ints) -> tuple[Ints, Ints]:
    """Each row's pairs of non-negative numbers below 2^31, ascending by the first, then by the second."""
    pairs_TM = np.sort((first_TM << 32) | second_TM, axis=1)
    return pairs_TM >> 32, pairs_TM & 0xFFFFFFFF


def _refuse(wrong: npt.NDArray[np.bool_], first_row: int, complaint: str) -> None:
    """Raise ChunkError for the first row where `wrong` ([T] or [T, anything]) is true."""
    if wrong.any():
        row = first_row + int(wrong.nonzero()[0][0])
        raise ChunkError(f"the record of row {row} {complaint}; it is damaged or of another recipe, and has to be made anew")
