"""Block-max filter in plain torch: an exact top-k that reads each logit once.

Shapes: T tokens, V vocabulary, K kept entries, B ids of a block, N whole blocks of a row, M blocks
of a row, the last one perhaps with fewer ids, F entries of the found blocks, R rows of the scratch.

1. Cut a row into blocks of B ids. One pass gives each block's maximum and sum of exponentials.
2. Take the K blocks with the greatest maxima, equal ones in the order of their ids.
3. The K greatest entries of these blocks are the row's, with ties to the lowest ids.
4. Sums of the found blocks are taken again without the kept entries.

Step 3 holds because no kept entry is below the K-th maximum, and of the entries that equal it, the
first K blocks have the first ones. So nothing overflows, however many entries tie. (For the filter:
Gaihre et al. 2021, "Dr. Top-k".)

On a CPU memory is the slow part: maxima and sums are taken while a row and its exponentials are in
the cache. On a GPU launches are the slow part: many rows are read at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.logits.topk.found import RawTopK

BLOCK_IDS = 128
# Logits that are read together, and logits that are selected from together. On a CPU two float32
# copies of the first stay in a core's cache, and the second saves calls. On a GPU both are 110 rows
# of today's vocabularies, with two float32 copies of 64 MB.
_CACHED_LOGITS, _GROUP_LOGITS = 1 << 17, 1 << 23
_GPU_LOGITS = 1 << 24
# Limits of a row's greatest logit / T for exponentials relative to 0: 2^32 times e^60 is in range,
# and e^-10 loses nothing.
_UNSHIFTED = (-10.0, 60.0)
_LEAST_SUM = 1e-30  # of exponentials relative to a row's maximum: below, float32 loses their digits
_LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Of each row, the whole blocks' maxima and sums of exp((z - base) / temperature)."""

    maxima_TN: Tensor
    sums_TN: Tensor
    base_T1: Tensor


def split(logits_TV: Tensor, *, k: int, temperature: float) -> RawTopK:
    """The top-k of logits in any floating dtype, strides and device. T and V are at least 1."""
    num_tokens, vocab_size = logits_TV.shape
    rows_read, rows_selected = rows_at_once(logits_TV.device, vocab_size)
    scratch_2RV = _empty(logits_TV, 2, min(num_tokens, rows_read), vocab_size)
    group_TV = logits_TV.split(rows_selected)
    groups = [
        _split_group(rows_TV, scratch_2RV, k=k, temperature=temperature) for rows_TV in group_TV
    ]
    ids_TK, logits_TK, base_T, sums_TM = (
        torch.cat(columns) for columns in zip(*groups, strict=True)
    )
    return RawTopK(ids_TK, logits_TK, base_T, sums_TM, BLOCK_IDS)


def rows_at_once(device: torch.device, vocab_size: int) -> tuple[int, int]:
    """How many rows are read together, and how many are selected from together."""
    read, selected = (
        (_CACHED_LOGITS, _GROUP_LOGITS) if device.type == "cpu" else (_GPU_LOGITS, _GPU_LOGITS)
    )
    return max(1, read // vocab_size), max(1, selected // vocab_size)


def _split_group(
    logits_TV: Tensor, scratch_2RV: Tensor, *, k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`split` of some rows: the tensors of a RawTopK, in its order."""
    # one pass, and the blocks that hold the top-k
    logits_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    blocks = _read_once(logits_TV, scratch_2RV, temperature=temperature)
    num_found = min(k, blocks.maxima_TN.shape[1])
    found_TK = first_greatest(blocks.maxima_TN, num_found).sort(dim=1).values

    # the top-k among their entries
    values_TF = _entries_of(logits_TV, found_TK).float()
    places_TK = _top_places(values_TF, k, maxima_TK=blocks.maxima_TN.gather(1, found_TK))
    kept_TK = values_TF.gather(1, places_TK)
    ids_TK = _ids_of(places_TK, found_TK, vocab_size=logits_TV.shape[1])

    # the found blocks' sums without the kept entries
    left_TF = (values_TF - blocks.base_T1).scatter_(1, places_TK, -torch.inf)
    left_TF = (left_TF.div_(temperature) if temperature != 1.0 else left_TF).exp_()
    whole_TF, last_TR = left_TF.tensor_split([num_found * BLOCK_IDS], dim=1)
    found_sums_TK = whole_TF.unflatten(1, (num_found, BLOCK_IDS)).sum(dim=2)
    sums = [blocks.sums_TN.scatter(1, found_TK, found_sums_TK)]
    if last_TR.shape[1]:
        sums.append(last_TR.sum(dim=1, keepdim=True))
    base_T1, sums_TM = blocks.base_T1, torch.cat(sums, dim=1)

    # rows whose kept entries dwarf all others: relative to the greatest of the others
    faint_T = sums_TM.sum(dim=1) < _LEAST_SUM
    if faint_T.any():
        base_T1[faint_T], sums_TM[faint_T] = _rest_alone(
            logits_TV[faint_T], ids_TK[faint_T], temperature=temperature
        )
    return ids_TK.int(), kept_TK, base_T1[:, 0], sums_TM


def _read_once(logits_TV: Tensor, scratch_2RV: Tensor, *, temperature: float) -> _Blocks:
    """Maxima, and sums relative to 0, which the logits of language models allow.

    Subtracting a base would take half as long again. Rows that need one are read twice.
    """
    maxima_TN, sums_TN = _maxima_and_sums(logits_TV, None, scratch_2RV, temperature=temperature)
    last_TR = logits_TV[:, maxima_TN.shape[1] * BLOCK_IDS :]
    greatest_T1 = torch.cat([maxima_TN, last_TR.float()], dim=1).amax(dim=1, keepdim=True)
    least, most = (bound * temperature for bound in _UNSHIFTED)
    high_T = ((greatest_T1 < least) | (greatest_T1 > most) | greatest_T1.isnan())[:, 0]
    base_T1 = greatest_T1.clamp_(min=_LEAST).masked_fill_(~high_T[:, None], 0.0)
    if high_T.any():
        sums_TN[high_T] = _maxima_and_sums(
            logits_TV[high_T], base_T1[high_T], scratch_2RV, temperature=temperature
        )[1]
    return _Blocks(maxima_TN, sums_TN, base_T1)


def _maxima_and_sums(
    logits_TV: Tensor, base_T1: Tensor | None, scratch_2RV: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of the whole blocks, relative to the base or to 0, a few rows at a time, which stay in the
    cache."""
    num_tokens, num_blocks = logits_TV.shape[0], logits_TV.shape[1] // BLOCK_IDS
    covered, at_once = num_blocks * BLOCK_IDS, scratch_2RV.shape[1]
    maxima_TN, sums_TN = _empty(logits_TV, 2, num_tokens, num_blocks)
    for start in range(0, num_tokens, at_once):
        rows = slice(start, start + at_once)
        rows_RV = logits_TV[rows, :covered]
        float_RV, weights_RV = scratch_2RV[:, : len(rows_RV), :covered]
        rows_RV = rows_RV if rows_RV.dtype == torch.float32 else float_RV.copy_(rows_RV)
        torch.amax(rows_RV.unflatten(1, (num_blocks, BLOCK_IDS)), dim=2, out=maxima_TN[rows])
        if base_T1 is not None:
            rows_RV = torch.sub(rows_RV, base_T1[rows], out=weights_RV)
        if temperature != 1.0:
            rows_RV = torch.div(rows_RV, temperature, out=weights_RV)
        torch.exp(rows_RV, out=weights_RV)
        torch.sum(weights_RV.unflatten(1, (num_blocks, BLOCK_IDS)), dim=2, out=sums_TN[rows])
    return maxima_TN, sums_TN


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _entries_of(logits_TV: Tensor, found_TK: Tensor) -> Tensor:
    """[T, F]: the entries of the found blocks (ascending), then those after the last whole block.

    Logits of a row are contiguous.
    """
    vocab_size = logits_TV.shape[1]
    last_TR = logits_TV[:, vocab_size // BLOCK_IDS * BLOCK_IDS :]
    if found_TK.shape[1] == 0:
        return last_TR
    found_TF = windows(logits_TV, found_TK * BLOCK_IDS, width=BLOCK_IDS).flatten(1)
    return torch.cat([found_TF, last_TR], dim=1) if last_TR.shape[1] else found_TF


def windows(logits_TV: Tensor, first_ids_TX: Tensor, *, width: int) -> Tensor:
    """[T, X, width]: the runs of `width` logits that start at these ids of each row.

    Logits of a row are contiguous. A run is copied whole, where torch.gather would copy entries.
    """
    num_tokens, vocab_size = logits_TV.shape
    stride = logits_TV.stride(0)
    runs_XB = logits_TV.as_strided(
        ((num_tokens - 1) * stride + vocab_size - width + 1, width), (1, 1)
    )
    starts_TX = first_ids_TX + stride * torch.arange(num_tokens, device=logits_TV.device)[:, None]
    return runs_XB.index_select(0, starts_TX.flatten()).view(*first_ids_TX.shape, width)


def _ids_of(places_TK: Tensor, found_TK: Tensor, *, vocab_size: int) -> Tensor:
    """The ids of positions among `_entries_of`."""
    num_found = found_TK.shape[1]
    last_TK = places_TK + (vocab_size // BLOCK_IDS - num_found) * BLOCK_IDS
    if num_found == 0:
        return last_TK
    block_TK = found_TK.gather(1, (places_TK // BLOCK_IDS).clamp(max=num_found - 1))
    return torch.where(
        places_TK < num_found * BLOCK_IDS, block_TK * BLOCK_IDS + places_TK % BLOCK_IDS, last_TK
    )


def _rest_alone(logits_TV: Tensor, ids_TK: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """The greatest logit that is not kept [T, 1], and the blocks' sums relative to it [T, M]."""
    rest_TV = logits_TV.float().scatter(1, ids_TK, -torch.inf)
    base_T1 = rest_TV.amax(dim=1, keepdim=True)
    weights_TV = ((rest_TV - base_T1.clamp(min=_LEAST)) / temperature).exp()
    padded_TV = torch.nn.functional.pad(weights_TV, (0, -weights_TV.shape[1] % BLOCK_IDS))
    return base_T1, padded_TV.unflatten(1, (-1, BLOCK_IDS)).sum(dim=2)


def _top_places(values_TF: Tensor, k: int, *, maxima_TK: Tensor) -> Tensor:
    """`first_greatest` of entries that include the found blocks' maxima.

    Where these are k, few other entries reach the least of them: those that do are gathered first.
    """
    if not 0 < k <= maxima_TK.shape[1]:
        return first_greatest(values_TF, k)
    reach_TF = values_TF >= maxima_TK.amin(dim=1, keepdim=True)
    rows_C, places_C = reach_TF.nonzero().unbind(1)  # by row, then by place
    counts_T = rows_C.bincount(minlength=len(values_TF))
    firsts_T = counts_T.cumsum(0) - counts_T
    at = rows_C, torch.arange(len(rows_C), device=rows_C.device) - firsts_T[rows_C]
    shape = (len(values_TF), max(k, int(counts_T.max())))
    values_TC = values_TF.new_full(shape, -torch.inf).index_put_(at, values_TF[rows_C, places_C])
    places_TC = places_C.new_zeros(shape).index_put_(at, places_C)
    return places_TC.gather(1, first_greatest(values_TC, k))


def first_greatest(values_TF: Tensor, k: int) -> Tensor:
    """int64 [T, k]: the places of the k greatest of float32 values; -0 equals +0.

    By value descending, ties by place ascending. The sort key is one int64: the value's bits, as an
    integer of the same order, above the place counted from the end. So no two keys are equal.
    """
    last = values_TF.shape[1] - 1
    bits_TF = (values_TF + 0.0).view(torch.int32)  # -0 becomes +0
    ordered_TF = bits_TF ^ ((bits_TF >> 31) & 0x7FFFFFFF)
    keys_TF = (ordered_TF.long() << 32) | torch.arange(last, -1, -1, device=values_TF.device)
    return last - (keys_TF.topk(k, dim=1).values & 0xFFFFFFFF)
