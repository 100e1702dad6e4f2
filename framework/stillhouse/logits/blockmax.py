"""The exact block-max filter in plain torch: the top-k out of the few blocks that hold it.

Shapes: T tokens, V vocabulary, K kept entries, M entries of a row, B a block's width, N = M // B blocks, F entries of the found blocks.

The K blocks with the greatest maxima, equal ones in the order of their ids, hold the K greatest entries with ties to the lowest ids: no
kept entry is below the K-th maximum, and of the entries that equal it, the first K blocks have the first ones. So the same exact top-k,
taken first over maxima and then over the blocks found, never overflows, however many entries tie. (For the filter: Gaihre et al. 2021,
"Dr. Top-k".)

Memory is the slow part: a row is read once, and its maxima and sums are taken while it and its exponentials lie in the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.logits.rawtopk import RawTopK

_WIDTH, _INNER_WIDTH = 128, 8  # of blocks, and of blocks within the blocks found
_CACHED_LOGITS = 1 << 17  # whose two float32 copies stay in a core's cache
_GROUP_LOGITS = 1 << 22  # whose rows are selected from together: it saves calls
_LEAST_SUM = 1e-30  # of exponentials relative to a row's maximum: below, float32 loses their digits
_LEAST = torch.finfo(torch.float32).min


def split(logits_TV: Tensor, *, k: int, temperature: float) -> RawTopK:
    """The top-k of logits in any floating dtype, strides and device. T and V are at least 1."""
    group_rows = max(1, _GROUP_LOGITS // logits_TV.shape[1])
    groups = [_split_group(rows_TV, k=k, temperature=temperature) for rows_TV in logits_TV.split(group_rows)]
    return RawTopK(*(torch.cat(columns) for columns in zip(*groups, strict=True)))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Of each row, its whole blocks' maxima, the sums of exp((z - top) / temperature) over them, and the row's greatest logit."""

    maxima_TN: Tensor
    sums_TN: Tensor
    top_T1: Tensor


def _split_group(logits_TV: Tensor, *, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a RawTopK."""
    logits_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    blocks = _read_once(logits_TV, temperature=temperature)
    found_TK = first_greatest(blocks.maxima_TN, min(k, blocks.maxima_TN.shape[1])).sort(dim=1).values
    values_TF = entries_of(logits_TV, found_TK, width=_WIDTH).float()
    places_TK = _top_places(values_TF, k)
    kept_TK = values_TF.gather(1, places_TK)
    outside_T1 = blocks.sums_TN.scatter(1, found_TK, 0.0).sum(dim=1, keepdim=True)
    left_TF = (values_TF - blocks.top_T1.clamp(min=_LEAST)).scatter_(1, places_TK, -torch.inf)
    rest_T1 = outside_T1 + left_TF.div_(temperature).exp_().sum(dim=1, keepdim=True)
    ids_TK = ids_of(places_TK, found_TK, width=_WIDTH, num_entries=logits_TV.shape[1])
    base_T1 = blocks.top_T1.clone()
    faint_T = (rest_T1 < _LEAST_SUM)[:, 0]
    if faint_T.any():
        base_T1[faint_T], rest_T1[faint_T] = _rest_alone(logits_TV[faint_T], ids_TK[faint_T], temperature=temperature)
    return ids_TK.int(), kept_TK, base_T1[:, 0], rest_T1[:, 0]


def _read_once(logits_TV: Tensor, *, temperature: float) -> _Blocks:
    num_tokens, vocab_size = logits_TV.shape
    num_blocks = vocab_size // _WIDTH
    covered, rows = num_blocks * _WIDTH, max(1, min(num_tokens, _CACHED_LOGITS // vocab_size))
    (maxima_TN, sums_TN), top_T1 = _empty(logits_TV, 2, num_tokens, num_blocks), _empty(logits_TV, num_tokens, 1)
    scratch_RV, float_RV = _empty(logits_TV, 2, rows, vocab_size)
    for start in range(0, num_tokens, rows):
        rows_RV, here = logits_TV[start : start + rows], slice(start, start + rows)
        num_rows = len(rows_RV)
        rows_RV = rows_RV if rows_RV.dtype == torch.float32 else float_RV[:num_rows].copy_(rows_RV)
        torch.amax(rows_RV[:, :covered].unflatten(1, (num_blocks, _WIDTH)), dim=2, out=maxima_TN[here])
        top_T1[here] = torch.cat([maxima_TN[here], rows_RV[:, covered:]], dim=1).amax(dim=1, keepdim=True)
        shifted_RV = torch.sub(rows_RV, top_T1[here].clamp(min=_LEAST), out=scratch_RV[:num_rows])
        shifted_RV = shifted_RV.div_(temperature) if temperature != 1.0 else shifted_RV
        torch.sum(shifted_RV.exp_()[:, :covered].unflatten(1, (num_blocks, _WIDTH)), dim=2, out=sums_TN[here])
    return _Blocks(maxima_TN, sums_TN, top_T1)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _rest_alone(logits_TV: Tensor, ids_TK: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 [T, 1] twice: the greatest logit that is not kept, and the others' exponentials relative to it."""
    rest_TV = logits_TV.float().scatter(1, ids_TK, -torch.inf)
    base_T1 = rest_TV.amax(dim=1, keepdim=True)
    return base_T1, ((rest_TV - base_T1.clamp(min=_LEAST)) / temperature).exp().sum(dim=1, keepdim=True)


def _top_places(values_TM: Tensor, k: int) -> Tensor:
    """`first_greatest`, by way of narrow blocks where the row is long enough to gain by it."""
    num_entries, width = values_TM.shape[1], _INNER_WIDTH
    if num_entries < 4 * k * width:
        return first_greatest(values_TM, k)
    maxima_TN = values_TM[:, : num_entries // width * width].unflatten(1, (-1, width)).amax(dim=2)
    found_TK = first_greatest(maxima_TN, k).sort(dim=1).values
    places_TK = first_greatest(entries_of(values_TM, found_TK, width=width), k)
    return ids_of(places_TK, found_TK, width=width, num_entries=num_entries)


def first_greatest(values_TM: Tensor, k: int) -> Tensor:
    """int64 [T, k], the places of the k greatest of float32 values, by value descending, ties by place ascending; -0 equals +0.

    A value's bits, made to order as integers, above its place counted from the end are one key, so that no two are equal.
    """
    last = values_TM.shape[1] - 1
    bits_TM = (values_TM + 0.0).view(torch.int32)  # -0 becomes +0
    ordered_TM = bits_TM ^ ((bits_TM >> 31) & 0x7FFFFFFF)
    keys_TM = (ordered_TM.long() << 32) | torch.arange(last, -1, -1, device=values_TM.device)
    return last - (keys_TM.topk(k, dim=1).values & 0xFFFFFFFF)


def entries_of(values_TM: Tensor, found_TK: Tensor, *, width: int) -> Tensor:
    """[T, F]: the entries of the found blocks (ascending), then those after the last whole block. Entries of a row lie side by side."""
    num_rows, num_entries = values_TM.shape
    last_TR = values_TM[:, num_entries // width * width :]
    if found_TK.shape[1] == 0:
        return last_TR
    stride = values_TM.stride(0)
    windows_XB = values_TM.as_strided(((num_rows - 1) * stride + num_entries - width + 1, width), (1, 1))
    starts_TK = found_TK * width + stride * torch.arange(num_rows, device=values_TM.device)[:, None]
    found_TF = windows_XB.index_select(0, starts_TK.flatten()).view(num_rows, -1)  # which copies each window whole; gather would not
    return torch.cat([found_TF, last_TR], dim=1) if last_TR.shape[1] else found_TF


def ids_of(places_TK: Tensor, found_TK: Tensor, *, width: int, num_entries: int) -> Tensor:
    """The places in the row of places among its `entries_of`."""
    num_found = found_TK.shape[1]
    last_TK = places_TK + (num_entries // width - num_found) * width
    if num_found == 0:
        return last_TK
    block_TK = found_TK.gather(1, (places_TK // width).clamp(max=num_found - 1))
    return torch.where(places_TK < num_found * width, block_TK * width + places_TK % width, last_TK)
