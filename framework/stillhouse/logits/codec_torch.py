"""The codec on any device, in torch, with one synchronisation at the end, to learn what to refuse.

Shapes: T tokens, K exact head entries, N tail draws, B bytes of a record or section, M = K or N.

The bytes are those of `codec_numpy`: only whole numbers, sorting, and operations that round to
nearest (+, -, *, /, square root) decide them. Exponentials and logarithms, which differ between
libraries, come after them, in float64: decoded values agree to a bit of float32.
"""

import math
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.logits import record
from stillhouse.logits.compressed import CompressedLogits, concatenate
from stillhouse.logits.record import Complaints
from stillhouse.logits.spec import TargetSpec, elias_fano_bytes, low_bits

_BLOCK_ENTRIES = 1 << 21  # ids of one block: enough for a GPU, and some 200 MB of its memory


def encode(c: CompressedLogits, spec: TargetSpec) -> Tensor:
    """`codec.encode` of targets that are of `spec`."""
    blocks = [
        _encode_block(c.map(itemgetter(rows)), spec) for rows in _row_blocks(c.num_tokens, spec)
    ]
    _require_none([complaints for _, complaints in blocks])
    return torch.cat([records_TB for records_TB, _ in blocks])


def decode(records_TB: Tensor, spec: TargetSpec) -> CompressedLogits:
    """`codec.decode` of records that have the size of `spec`."""
    blocks = [
        _decode_block(records_TB[rows], spec) for rows in _row_blocks(records_TB.shape[0], spec)
    ]
    _require_none([complaints for _, complaints in blocks])
    return concatenate([target for target, _ in blocks])


def _row_blocks(num_tokens: int, spec: TargetSpec) -> Iterator[slice]:
    """Slices of a block of rows each; one at least."""
    step = max(1, _BLOCK_ENTRIES // (spec.k + spec.num_draws))
    return (slice(start, start + step) for start in range(0, max(1, num_tokens), step))


def _require_none(by_block: list[Complaints]) -> None:
    """Raise ChunkError for the first row that breaks a rule, naming the first rule that it
    breaks."""
    wrong_TC = torch.cat(
        [torch.stack([wrong_T for _, wrong_T in complaints], dim=1) for complaints in by_block]
    )
    if wrong_TC.any():
        row = int(wrong_TC.any(dim=1).int().argmax())
        complaint, _ = by_block[0][int(wrong_TC[row].int().argmax())]
        raise record.refusal(row, complaint)


def _encode_block(c: CompressedLogits, spec: TargetSpec) -> tuple[Tensor, Complaints]:
    complaints: Complaints = []
    sections: list[Tensor] = []
    if spec.k:
        sections += _encode_kept(c, spec, complaints)
    if spec.num_draws:
        sections += _encode_ids(c.tail_ids_TN.long(), spec, complaints, distinct=False)
    if spec.weighted:
        sections.append(_encode_draw_values(c, spec, complaints))
    if c.label_logprob_T is not None:
        complaints += record.wrong_new_label(c.label_logprob_T)
        label_T = c.label_logprob_T.clamp(record.LEAST_LOG_TAIL, record.MOST_LOG_TAIL)
        sections.append(label_T.half()[:, None].view(torch.uint8))
    if c.tail_entropy_T is not None:
        complaints += record.wrong_entropy(c.tail_entropy_T)
        sections.append((c.tail_entropy_T + 0.0).half()[:, None].view(torch.uint8))
    return torch.cat(sections, dim=1), complaints


def _decode_block(records_TB: Tensor, spec: TargetSpec) -> tuple[CompressedLogits, Complaints]:
    complaints: Complaints = []
    header, ids, values, draws, draw_values, label, entropy = records_TB.split(
        spec.section_bytes, dim=1
    )
    more: dict[str, Any] = {}
    least_T1 = torch.zeros((1, 1), dtype=torch.float64, device=records_TB.device)
    kept = ids.int(), values.float(), values.new_zeros(len(values), dtype=torch.float32)
    if spec.k:
        kept, least_T1 = _decode_kept(header, ids, values, spec, complaints)
    if spec.num_draws:
        draws = _decode_ids(draws, spec.num_draws, spec, complaints, distinct=False)
    if spec.weighted:
        complaints += record.wrong_draw_codes(draws, draw_values)
        more["draw_logprobs_TN"] = (least_T1 - record.draw_drops_of(draw_values.double())).float()
    if spec.label_logprob:
        more["label_logprob_T"] = _half_in(label)
        complaints += record.wrong_label(more["label_logprob_T"])
    if spec.tail_entropy:
        more["tail_entropy_T"] = _half_in(entropy)
        complaints += record.wrong_sign(entropy)
        complaints += record.wrong_entropy(more["tail_entropy_T"])
    target = CompressedLogits(
        *kept, draws.int(), vocab_size=spec.vocab_size, temperature=spec.temperature, **more
    )
    return target, complaints


def _half_in(section: Tensor) -> Tensor:
    """The binary16 number that a section of two bytes holds, float32 [T]."""
    whole = section.clone(memory_format=torch.contiguous_format)
    return whole.view(torch.float16)[:, 0].float()


# Ids
# ------------------------------------------------------------------------------------------------


def _encode_ids(
    ids_TM: Tensor, spec: TargetSpec, complaints: Complaints, *, distinct: bool
) -> list[Tensor]:
    complaints += record.wrong_ids(ids_TM, spec, distinct=distinct)
    num_rows, m = ids_TM.shape
    low, (_, high_bytes) = low_bits(m, spec.vocab_size), elias_fano_bytes(m, spec.vocab_size)
    ones_TM = (ids_TM >> low) + torch.arange(m, device=ids_TM.device)
    high_bits = ids_TM.new_zeros((num_rows, 8 * high_bytes), dtype=torch.uint8)
    # clamped: an id that will be refused must not fault the device
    high_bits.scatter_(1, ones_TM.clamp(0, 8 * high_bytes - 1), 1)
    high_bits = high_bits.view(num_rows, high_bytes, 8) << _bit_numbers(ids_TM)
    high_section = high_bits.sum(dim=2, dtype=torch.uint8)
    return [_pack(ids_TM & ((1 << low) - 1), low), high_section]


def _decode_ids(
    section: Tensor, m: int, spec: TargetSpec, complaints: Complaints, *, distinct: bool
) -> Tensor:
    """Ids [T, m]. The i-th one bit is where the count of ones first reaches i, so that no shape
    depends on the bytes."""
    low, sizes = low_bits(m, spec.vocab_size), elias_fano_bytes(m, spec.vocab_size)
    low_section, high_section = section.split(sizes, dim=1)
    high_bits = ((high_section[:, :, None] >> _bit_numbers(section)) & 1).flatten(1)
    count_TH = high_bits.cumsum(dim=1, dtype=torch.int32)
    complaints += record.wrong_number(count_TH[:, -1], m)
    index_M = torch.arange(m, dtype=torch.int32, device=section.device)
    ones_TM = torch.searchsorted(count_TH, (index_M + 1).repeat(section.shape[0], 1))
    ids_TM = ((ones_TM - index_M) << low) | _unpack(low_section, m, low, complaints)
    complaints += record.wrong_ids(ids_TM, spec, distinct=distinct)
    return ids_TM


# Bit streams
# ------------------------------------------------------------------------------------------------


def _pack(values_TM: Tensor, width: int) -> Tensor:
    """Values of `width` bits each as a bit stream, uint8 [T, ceil(M * width / 8)]."""
    num_rows, m = values_TM.shape
    if width == 0:
        return values_TM.new_empty((num_rows, 0), dtype=torch.uint8)
    if width != 8:
        values_TM = _recut(values_TM, -(-m * width // 8), width=width, as_width=8)
    return values_TM.to(torch.uint8)


def _unpack(section: Tensor, m: int, width: int, complaints: Complaints) -> Tensor:
    """The inverse of `_pack`, int64 [T, M]."""
    complaints += record.wrong_end(section, m * width)
    return section.long() if width == 8 else _recut(section.long(), m, width=8, as_width=width)


def _recut(fields_TM: Tensor, count: int, *, width: int, as_width: int) -> Tensor:
    """Cut a bit stream, given as fields of `width` bits, into `count` fields of `as_width` bits.

    After the stream's end there are zeros.
    """
    starts_N = as_width * torch.arange(count, device=fields_TM.device)
    first_N, skipped_N = starts_N // width, starts_N % width
    num_touched = -(-(width - 1 + as_width) // width)  # by one new field, at most
    padded = functional.pad(fields_TM, (0, num_touched))
    touched_TN = padded.index_select(1, first_N)
    for further in range(1, num_touched):
        touched_TN |= padded.index_select(1, first_N + further) << (further * width)
    return (touched_TN >> skipped_N) & ((1 << as_width) - 1)


def _bit_numbers(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


# Values
# ------------------------------------------------------------------------------------------------


def _encode_kept(c: CompressedLogits, spec: TargetSpec, complaints: Complaints) -> list[Tensor]:
    """The header, ids and values of kept entries."""
    best_T1, log_tail_T1 = c.logprobs_TK.amax(dim=1, keepdim=True), c.tail_logmass_T[:, None]
    complaints += record.wrong_target(best_T1[:, 0], c.tail_logmass_T, spec)

    # header
    drops_TK = (best_T1 - c.logprobs_TK).clamp(max=record.MOST_RANGE)
    range_T1 = drops_TK.amax(dim=1, keepdim=True).clamp(min=record.LEAST_RANGE).half()
    limited_T1 = log_tail_T1.clamp(record.LEAST_LOG_TAIL, record.MOST_LOG_TAIL)
    stored_tail_T1 = torch.where(log_tail_T1 == -math.inf, log_tail_T1, limited_T1).half()
    header = torch.cat([range_T1, stored_tail_T1], dim=1).view(torch.uint8)

    # ids ascending, values in their order: drops below the best entry, quantised
    ids_TK, order_TK = c.token_ids_TK.long().sort(dim=1)
    codes_TK = record.codes_of(_root(drops_TK), _root(range_T1.float()), spec).long()
    ids = _encode_ids(ids_TK, spec, complaints, distinct=True)
    return [header, *ids, _pack(codes_TK.gather(1, order_TK), spec.value_bits)]


def _encode_draw_values(c: CompressedLogits, spec: TargetSpec, complaints: Complaints) -> Tensor:
    """The values of weighted draws, by the least kept entry as it decodes."""
    assert c.draw_logprobs_TN is not None
    complaints += record.wrong_draws(c.tail_ids_TN, c.draw_logprobs_TN)
    below_TN = -c.draw_logprobs_TN
    if spec.k:
        best_T1, least_T1 = c.logprobs_TK.aminmax(dim=1, keepdim=True)[::-1]
        drop_T1 = (best_T1 - least_T1).clamp(max=record.MOST_RANGE)
        range_T1 = drop_T1.clamp(min=record.LEAST_RANGE).half().float()
        largest_T1 = record.codes_of(_root(drop_T1), _root(range_T1), spec).double()
        stored_T1 = record.drops_of(largest_T1, (1 + range_T1.double()).sqrt() - 1, spec)
        below_TN = (best_T1 - c.draw_logprobs_TN) - stored_T1.float()
    # clamped: a number that will be refused must not fault the device
    return record.draw_codes_of(below_TN, _root).nan_to_num(0).to(torch.uint8)


def _decode_kept(
    header: Tensor, ids: Tensor, values: Tensor, spec: TargetSpec, complaints: Complaints
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Ids and log-probabilities [T, K] by logprob descending, the tail's log mass [T], and the
    least log-probability in float64 [T, 1]."""
    halves_T2 = header.clone(memory_format=torch.contiguous_format).view(torch.float16)
    range_T1, log_tail_T1 = halves_T2.float().split(1, dim=1)
    complaints += record.wrong_header(range_T1[:, 0], log_tail_T1[:, 0], spec)
    ids_TK = _decode_ids(ids, spec.k, spec, complaints, distinct=True)
    codes_TK = _unpack(values, spec.k, spec.value_bits, complaints)
    codes_TK, order_TK = codes_TK.sort(dim=1, stable=True)
    complaints += record.wrong_codes(codes_TK, range_T1[:, 0], spec)
    logprobs_TK = _logprobs(codes_TK, range_T1, log_tail_T1, spec)
    kept = ids_TK.gather(1, order_TK).int(), logprobs_TK.float(), log_tail_T1[:, 0]
    return kept, logprobs_TK[:, -1:]


def _logprobs(codes_TK: Tensor, range_T1: Tensor, log_tail_T1: Tensor, spec: TargetSpec) -> Tensor:
    """float64 [T, K]: dequantised, and scaled so that kept entries and tail sum to 1."""
    drops_TK = record.drops_of(codes_TK.double(), (1 + range_T1.double()).sqrt() - 1, spec)
    log_kept_T1 = _log_one_minus_exp(log_tail_T1.double())
    best_T1 = log_kept_T1 - (-drops_TK).exp().sum(dim=1, keepdim=True).log()
    return best_T1 - drops_TK


def _root(drops: Tensor) -> Tensor:
    """r(d) in float32. Through float64, since torch's float32 square root on a CPU does not always
    round to nearest."""
    return (1 + drops).double().sqrt().float() - 1


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends (Maechler 2012, "Accurately computing log(1 -
    exp(-|a|))")."""
    near_zero = x.clamp(min=-math.log(2))
    return torch.where(x > -math.log(2), (-near_zero.expm1()).log(), (-x.exp()).log1p())
