"""The codec on the CPU, in numpy: half a million tokens a second and more on one core.

Shapes: T tokens, K exact head entries, N tail draws, B bytes of a record or section, M = K or N.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.errors import ChunkError
from stillhouse.logits import record
from stillhouse.logits.compressed import CompressedLogits
from stillhouse.logits.record import Complaints
from stillhouse.logits.spec import TargetSpec, elias_fano_bytes, low_bits

_HALF = np.dtype("<f2")
_BLOCK_ENTRIES = 1 << 16  # ids of one block: bounds the memory, and stays in the cache

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def encode(c: CompressedLogits, spec: TargetSpec) -> Tensor:
    """`codec.encode` of CPU tensors that are of `spec`."""
    ids_TK, draws_TN = c.token_ids_TK.numpy(), c.tail_ids_TN.numpy()
    logprobs_TK, log_tail_T = c.logprobs_TK.numpy(), c.tail_logmass_T.numpy()
    records_TB = np.empty((c.num_tokens, spec.bytes_per_token), np.uint8)

    def write(rows: slice) -> None:
        kept_TK, drawn_TN = ids_TK[rows].astype(np.int64), draws_TN[rows].astype(np.int64)
        sections = []
        if spec.k:
            sections += _encode_kept(
                kept_TK, logprobs_TK[rows], log_tail_T[rows], spec, first_row=rows.start
            )
        if spec.num_draws:
            sections += _encode_ids(drawn_TN, spec, first_row=rows.start, distinct=False)
        if c.draw_logprobs_TN is not None:
            sections.append(
                _encode_draw_values(
                    drawn_TN,
                    c.draw_logprobs_TN.numpy()[rows],
                    logprobs_TK[rows],
                    spec,
                    first_row=rows.start,
                )
            )
        if c.label_logprob_T is not None:
            label_T = c.label_logprob_T.numpy()[rows]
            _require(record.wrong_new_label(label_T), rows.start)
            sections.append(_halves(label_T.clip(record.LEAST_LOG_TAIL, record.MOST_LOG_TAIL)))
        if c.tail_entropy_T is not None:
            entropy_T = c.tail_entropy_T.numpy()[rows] + np.float32(0)  # -0 becomes 0
            _require(record.wrong_entropy(entropy_T), rows.start)
            sections.append(_halves(entropy_T))
        np.concatenate(sections, axis=1, out=records_TB[rows])

    _in_blocks(write, c.num_tokens, spec)
    return torch.from_numpy(records_TB)


def decode(records_TB: Tensor, spec: TargetSpec) -> CompressedLogits:
    """`codec.decode` of CPU records that have the size of `spec`."""
    # outputs, and where a record's sections end
    records, num_tokens = records_TB.numpy(), records_TB.shape[0]
    ids_TK = np.empty((num_tokens, spec.k), np.int32)
    logprobs_TK = np.empty((num_tokens, spec.k), np.float32)
    log_tail_T = np.zeros(num_tokens, np.float32)
    draws_TN = np.empty((num_tokens, spec.num_draws), np.int32)
    draw_logprobs_TN = np.empty(draws_TN.shape, np.float32) if spec.weighted else None
    label_T = np.empty(num_tokens, np.float32) if spec.label_logprob else None
    entropy_T = np.empty(num_tokens, np.float32) if spec.tail_entropy else None
    ends = list(accumulate(spec.section_bytes))

    def read(rows: slice) -> None:
        header, ids, values, draws, draw_values, label, entropy = np.split(
            records[rows], ends[:-1], axis=1
        )
        least_T1: npt.NDArray[np.float64] = np.zeros((1, 1))
        if spec.k:
            halves_T2 = np.ascontiguousarray(header).view(_HALF)
            range_T, log_tail_T[rows] = halves_T2.astype(np.float32).T
            _require(record.wrong_header(range_T, log_tail_T[rows], spec), rows.start)
            kept_TK = _decode_ids(ids, spec.k, spec, first_row=rows.start, distinct=True)
            unsorted_TK = _unpack(values, spec.k, width=spec.value_bits, first_row=rows.start)
            codes_TK, ids_TK[rows] = _sort_pairs(unsorted_TK, kept_TK)
            _require(record.wrong_codes(codes_TK, range_T, spec), rows.start)
            best_T1, drops_TK = _best_and_drops(codes_TK, range_T, log_tail_T[rows], spec)
            logprobs_TK[rows] = best_T1 - drops_TK
            least_T1 = best_T1 - drops_TK[:, -1:]
        if spec.num_draws:
            draws_TN[rows] = _decode_ids(
                draws, spec.num_draws, spec, first_row=rows.start, distinct=False
            )
        if draw_logprobs_TN is not None:
            _require(record.wrong_draw_codes(draws_TN[rows], draw_values), rows.start)
            below_TN = record.draw_drops_of(draw_values.astype(np.float64))
            draw_logprobs_TN[rows] = least_T1 - below_TN
        if label_T is not None:
            label_T[rows] = np.ascontiguousarray(label).view(_HALF)[:, 0]
            _require(record.wrong_label(label_T[rows]), rows.start)
        if entropy_T is not None:
            entropy_T[rows] = np.ascontiguousarray(entropy).view(_HALF)[:, 0]
            _require(record.wrong_sign(entropy), rows.start)
            _require(record.wrong_entropy(entropy_T[rows]), rows.start)

    # every block of rows
    _in_blocks(read, num_tokens, spec)
    return CompressedLogits(
        torch.from_numpy(ids_TK),
        torch.from_numpy(logprobs_TK),
        torch.from_numpy(log_tail_T),
        torch.from_numpy(draws_TN),
        vocab_size=spec.vocab_size,
        temperature=spec.temperature,
        draw_logprobs_TN=_tensor(draw_logprobs_TN),
        label_logprob_T=_tensor(label_T),
        tail_entropy_T=_tensor(entropy_T),
    )


def _tensor(array: Floats | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def _halves(numbers_T: Floats) -> Bytes:
    """A section of one binary16 number, uint8 [T, 2]."""
    return numbers_T.astype(_HALF)[:, None].view(np.uint8)


def _in_blocks(work: Callable[[slice], None], num_tokens: int, spec: TargetSpec) -> None:
    """Call `work` for blocks of rows. Raises ChunkError for the first row that is refused.

    `work` raises for the first row that breaks the first broken rule, so a refused block is done
    again row by row.
    """
    step = max(1, _BLOCK_ENTRIES // (spec.k + spec.num_draws))
    for start in range(0, num_tokens, step):
        rows = range(start, min(start + step, num_tokens))
        try:
            work(slice(rows.start, rows.stop))
        except ChunkError:
            for row in rows:
                work(slice(row, row + 1))
            raise


def _require(complaints: Complaints, first_row: int) -> None:
    for complaint, wrong_T in complaints:
        if wrong_T.any():
            raise record.refusal(first_row + int(wrong_T.argmax()), complaint)


# Ids
# ------------------------------------------------------------------------------------------------


def _encode_ids(ids_TM: Ints, spec: TargetSpec, *, first_row: int, distinct: bool) -> list[Bytes]:
    _require(record.wrong_ids(ids_TM, spec, distinct=distinct), first_row)
    num_rows, m = ids_TM.shape
    low, (_, high_bytes) = low_bits(m, spec.vocab_size), elias_fano_bytes(m, spec.vocab_size)
    high_bits = np.zeros((num_rows, 8 * high_bytes), np.uint8)
    np.put_along_axis(high_bits, (ids_TM >> low) + np.arange(m), 1, axis=1)
    return [
        _pack(ids_TM & ((1 << low) - 1), low),
        np.packbits(high_bits, axis=1, bitorder="little"),
    ]


def _decode_ids(
    section: Bytes, m: int, spec: TargetSpec, *, first_row: int, distinct: bool
) -> Ints:
    low, (low_bytes, _) = low_bits(m, spec.vocab_size), elias_fano_bytes(m, spec.vocab_size)
    high_bits = np.unpackbits(section[:, low_bytes:], axis=1, bitorder="little")
    _require(record.wrong_number(high_bits.sum(axis=1, dtype=np.int64), m), first_row)
    num_rows, num_bits = high_bits.shape
    ones_TM = np.flatnonzero(high_bits.view(np.bool_)).reshape(num_rows, m)
    high_TM = ones_TM - num_bits * np.arange(num_rows)[:, None] - np.arange(m)
    low_TM = _unpack(section[:, :low_bytes], m, width=low, first_row=first_row)
    ids_TM: Ints = (high_TM << low) | low_TM
    _require(record.wrong_ids(ids_TM, spec, distinct=distinct), first_row)
    return ids_TM


# Bit streams
# ------------------------------------------------------------------------------------------------


def _pack(values_TM: Ints, width: int) -> Bytes:
    """Values of `width` bits each as a bit stream, uint8 [T, ceil(M * width / 8)]."""
    num_rows, m = values_TM.shape
    if width == 0:
        return np.empty((num_rows, 0), np.uint8)
    if width != 8:
        values_TM = _recut(values_TM, -(-m * width // 8), width=width, as_width=8)
    return values_TM.astype(np.uint8)


def _unpack(section: Bytes, m: int, *, width: int, first_row: int) -> Ints:
    """The inverse of `_pack`, int64 [T, M]."""
    _require(record.wrong_end(section, m * width), first_row)
    fields_TM = section if width == 8 else _recut(section, m, width=8, as_width=width)
    return fields_TM.astype(np.int64)


def _recut(
    fields_TM: npt.NDArray[Any], count: int, *, width: int, as_width: int
) -> npt.NDArray[Any]:
    """Cut a bit stream, given as fields of `width` bits, into `count` fields of `as_width` bits.

    After the stream's end there are zeros.
    """
    starts_N = as_width * np.arange(count)
    first_N, skipped_N = starts_N // width, starts_N % width
    num_touched = -(-(width - 1 + as_width) // width)  # by one new field, at most
    narrow = np.int32 if num_touched * width < 32 else np.int64  # a fifth faster than the wider one
    padded = np.pad(fields_TM.astype(narrow), ((0, 0), (0, num_touched)))
    touched_TN = padded.take(first_N, axis=1)
    for further in range(1, num_touched):
        touched_TN |= padded.take(first_N + further, axis=1) << (further * width)
    touched_TN >>= skipped_N
    touched_TN &= (1 << as_width) - 1
    return touched_TN


# Values
# ------------------------------------------------------------------------------------------------


def _encode_kept(
    ids_TK: Ints, logprobs_TK: Floats, log_tail_T: Floats, spec: TargetSpec, *, first_row: int
) -> list[Bytes]:
    """The header, ids and values of kept entries."""
    best_T = logprobs_TK.max(axis=1)
    _require(record.wrong_target(best_T, log_tail_T, spec), first_row)

    # values: drops below the best entry, quantised
    range_T, codes_TK = _range_and_codes(best_T, logprobs_TK, spec)

    # header
    limited_T = log_tail_T.clip(record.LEAST_LOG_TAIL, record.MOST_LOG_TAIL)
    stored_tail_T = np.where(log_tail_T == -np.inf, log_tail_T, limited_T).astype(_HALF)
    header = np.stack([range_T, stored_tail_T], axis=1).view(np.uint8)

    # ids ascending, values in their order
    ids_TK, codes_TK = _sort_pairs(ids_TK, codes_TK)
    ids = _encode_ids(ids_TK, spec, first_row=first_row, distinct=True)
    return [header, *ids, _pack(codes_TK, spec.value_bits)]


def _range_and_codes(best_T: Floats, logprobs_TK: Floats, spec: TargetSpec) -> tuple[Any, Ints]:
    """R as binary16 [T], and the codes of kept entries."""
    drops_TK = np.minimum(best_T[:, None] - logprobs_TK, np.float32(record.MOST_RANGE))
    range_T = np.maximum(drops_TK.max(axis=1), np.float32(record.LEAST_RANGE)).astype(_HALF)
    range_root_T1 = _root(range_T.astype(np.float32)[:, None])
    codes_TK = record.codes_of(_root(drops_TK), range_root_T1, spec).astype(np.int64)
    return range_T, codes_TK


def _encode_draw_values(
    ids_TN: Ints, draw_logprobs_TN: Floats, logprobs_TK: Floats, spec: TargetSpec, *, first_row: int
) -> Bytes:
    """The values of weighted draws, by the least kept entry as it decodes."""
    _require(record.wrong_draws(ids_TN, draw_logprobs_TN), first_row)
    below_TN = -draw_logprobs_TN
    if spec.k:
        best_T = logprobs_TK.max(axis=1)
        range_T, codes_TK = _range_and_codes(best_T, logprobs_TK, spec)
        largest_T = codes_TK.max(axis=1).astype(np.float64)
        range_root_T = np.sqrt(1 + range_T.astype(np.float64)) - 1
        least_T = record.drops_of(largest_T, range_root_T, spec).astype(np.float32)
        below_TN = (best_T[:, None] - draw_logprobs_TN) - least_T[:, None]
    return record.draw_codes_of(below_TN, _root).astype(np.uint8)


def _root(drops: Floats) -> Floats:
    """r(d) in float32."""
    roots: Floats = np.sqrt(1 + drops) - 1
    return roots


def _best_and_drops(
    codes_TK: Ints, range_T: Floats, log_tail_T: Floats, spec: TargetSpec
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The best entry's log-probability [T, 1], such that kept entries and tail sum to 1, and the
    drops below it [T, K]."""
    range_root_T1 = np.sqrt(1 + range_T[:, None].astype(np.float64)) - 1
    drops_TK = record.drops_of(codes_TK.astype(np.float64), range_root_T1, spec)
    log_kept_T = _log_one_minus_exp(log_tail_T.astype(np.float64))
    best_T = log_kept_T - np.log(np.exp(-drops_TK).sum(axis=1))
    return best_T[:, None], drops_TK


def _log_one_minus_exp(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log(1 - e^x) for x < 0, accurate at both ends (Maechler 2012, "Accurately computing log(1 -
    exp(-|a|))")."""
    near_zero = np.maximum(x, -np.log(2))
    return np.where(x > -np.log(2), np.log(-np.expm1(near_zero)), np.log1p(-np.exp(x)))


def _sort_pairs(first_TM: Ints, second_TM: Ints) -> tuple[Ints, Ints]:
    """Each row's pairs ascending by the first number, then by the second.

    Numbers are below 2^31, the second ones not negative.
    """
    pairs_TM = np.sort((first_TM << 32) | second_TM, axis=1)
    return pairs_TM >> 32, pairs_TM & 0xFFFFFFFF
