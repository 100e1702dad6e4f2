"""Block-max filter in Triton: an exact top-k that reads each logit once, and the target from it.

Shapes: T tokens, V vocabulary, K kept entries, N draws, B ids of a block, M blocks of a row, C
candidates that there is room for. The algorithm, and why it is exact, are in `blockmax_torch`.

    kernel  programs   reads          writes
    read    T x tiles  every logit    each block's maximum and sum of exponentials, (e) its moment
    pick    T          M maxima       the K blocks with the top-k; the sums, (e) moments, of others
    gather  T          K B logits     candidates: entries that reach the K-th maximum, about 1.3 K
    finish  T          C candidates,  ids and log-probabilities in order, the tail's, the doubt, and
                       K B logits     the sums of the K blocks without the kept entries, (e) the
                                      tail's entropy, (w) how many entries of each are kept
    draw    T x N / D  M sums, (w) M  D draws
                       counts,
                       D B logits
    look_up T          1 or N logits  (l) the label's log-probability, (w) the draws'

What (e) is for a target's tail entropy alone, (l) for its label, (w) for weighted draws.

Kernels communicate through global memory, one launch after the other, so no kernel waits for its
own writes. The sort key of an entry is one int64: the value's bits, as an integer of the same
order, above the id counted from the end. They read a head's products and apply its scale and
soft-cap on the way, in float32.

A row is doubtful, to be compressed another way, if it has more candidates than room, if its rest is
too faint for float32 beside its maximum, or if it is no distribution; no other row is. All kernels
also run in Triton's interpreter, on the CPU.
"""

from collections.abc import Callable
from ctypes import c_float
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

from stillhouse.logits.compressed import CompressedLogits
from stillhouse.logits.head import AS_IT_IS, Curve
from stillhouse.logits.launching import may_pass, run_kernel
from stillhouse.logits.spec import TargetSpec
from stillhouse.logits.topk import blockmax_kernels_triton as kernels
from stillhouse.logits.topk import blockmax_torch
from stillhouse.logits.topk.blockmax_draw_triton import draw, look_up
from stillhouse.logits.topk.found import RawTopK

# Of K; above it `pick` and `finish` need more registers than there are, and minutes of compiling.
MOST_ENTRIES = 512
_TILE_LOGITS = 4096  # read by one program of `read`
_GATHERED_LOGITS = 2048  # read at a time by `gather` and `finish`
_DRAWS_AT_ONCE = 16  # by one program of `draw`
_WIDE_LOAD = 16  # logits of two loads of 16 bytes, or of four
# Of the highest bits of a maximum's order: others are the same in all numbers of the format.
_SEARCHED_BITS = {torch.bfloat16: 16, torch.float16: 19}
_BLOCKS_PER_WARP = 256  # of `pick` and `draw`, which hold all blocks of a row in registers
_ROOM_PER_ENTRY = 4  # candidates for each kept entry; language models' logits had 1.7 at most
_WIDTHS = (16, 128)  # the least and the greatest width of a block


def block_width(vocab_size: int, k: int) -> int:
    """Ids of a block: the power of two next above sqrt(V / K), within limits.

    There the M maxima and the K B entries of the found blocks are about as many.
    """
    least, most = _WIDTHS
    width: int = triton.next_power_of_2(int((vocab_size / max(1, k)) ** 0.5))
    return max(least, min(most, width))


def too_small(vocab_size: int, k: int) -> str | None:
    """The reason if there are so few blocks that the filter would drop none, or None."""
    if vocab_size // block_width(vocab_size, k) >= 2 * max(1, k):
        return None
    return f"{vocab_size} logits are too few blocks to filter for {k}"


@dataclass(frozen=True, slots=True)
class _Picked:
    """Of a block of rows: the blocks that hold the top-k, and what is known of the others."""

    found_TK: Tensor  # int32
    least_T: Tensor  # int32: the order of the K-th maximum
    top_T: Tensor
    rest_sums_TM: Tensor
    rests_2T: Tensor  # float64: the rows' sums and moments over these blocks


@dataclass(frozen=True, slots=True)
class _Found:
    """Of a block of rows: the top-k, the target but for draws, and what these need."""

    raw: RawTopK
    logprobs_TK: Tensor
    tails_2T: Tensor  # their log masses, and, where the spec has them, their entropies
    num_kept_TM: Tensor  # int16: of the ids of each block; none where draws are blind
    log_sum_T: Tensor  # float64: of all exponentials, relative to the greatest logit
    doubtful_T: Tensor


def launch(
    logits_TV: Tensor, *, k: int, temperature: float, width: int | None = None
) -> tuple[RawTopK, Tensor]:
    """The top-k of logits that are not `too_small`, and bool [T]: the doubtful rows. Asynchronous.

    K is at most MOST_ENTRIES. `width` overrides `block_width`: a power of two of which V has at
    least 2 K.
    """
    spec = TargetSpec(logits_TV.shape[1], k, num_draws=int(k == 0), temperature=temperature)
    rows = _Rows.of(logits_TV, AS_IT_IS)
    found = _find(rows, spec, width=width)
    return found.raw, found.doubtful_T


def compress_block(
    products_TV: Tensor,
    curve: Curve,
    spec: TargetSpec,
    *,
    seeds_T: Tensor,
    labels_T: Tensor,
    run: Callable[..., None] = run_kernel,
) -> tuple[CompressedLogits, Tensor]:
    """Targets of the logits that `curve` makes of products, and bool [T]: the doubtful rows.
    Asynchronous.

    Seeds are read for draws, and labels for their log-probability. A curve that falls is applied by
    torch before, since no maximum of products is one of logits. `run` is called as `run_kernel` is.
    """
    if curve.scale <= 0:
        products_TV, curve = curve.float32_logits(products_TV), AS_IT_IS
    rows = _Rows.of(products_TV, curve)
    found = _find(rows, spec, run=run)
    draws_TN = _draw(rows, found, seeds_T, spec, run=run)
    target = CompressedLogits(
        found.raw.token_ids_TK,
        found.logprobs_TK,
        found.tails_2T[0],
        draws_TN,
        vocab_size=spec.vocab_size,
        temperature=spec.temperature,
        tail_entropy_T=found.tails_2T[1] if spec.tail_entropy else None,
    )

    # log-probabilities of given ids
    if spec.label_logprob:
        label_T1 = _look_up(rows, found, labels_T[:, None], spec, run=run)
        target = replace(target, label_logprob_T=label_T1[:, 0])
    if spec.weighted:
        logprobs_TN = _look_up(rows, found, draws_TN, spec, run=run)
        target = replace(target, draw_logprobs_TN=logprobs_TN)
    return target, found.doubtful_T


@dataclass(frozen=True, slots=True)
class _Rows:
    """Products, and how kernels read them."""

    products_TV: Tensor
    curve: Curve

    @classmethod
    def of(cls, products_TV: Tensor, curve: Curve) -> "_Rows":
        in_place = products_TV.stride(1) == 1
        return cls(products_TV if in_place else products_TV.contiguous(), curve)

    @property
    def arguments(self) -> tuple[Tensor, int, int, float, float]:
        stride, vocab_size = self.products_TV.stride(0), self.products_TV.shape[1]
        return (self.products_TV, stride, vocab_size, self.curve.scale, self.curve.softcap or 1.0)

    @property
    def has_softcap(self) -> bool:
        return self.curve.softcap is not None

    @property
    def searched_bits(self) -> int:
        """Of the block maxima, in which not all numbers of float32 occur."""
        exact = self.curve == AS_IT_IS
        return _SEARCHED_BITS.get(self.products_TV.dtype, 32) if exact else 32

    @property
    def readable(self) -> int:
        """Columns that exist in memory, V of them products: up to a multiple of `_WIDE_LOAD` where
        the next row begins behind it."""
        rows_TV = self.products_TV
        num_tokens, vocab_size = rows_TV.shape
        wide = triton.cdiv(vocab_size, _WIDE_LOAD) * _WIDE_LOAD
        start = rows_TV.storage_offset() + (num_tokens - 1) * rows_TV.stride(0)
        room = rows_TV.untyped_storage().nbytes() // rows_TV.element_size() - start
        return wide if wide <= min(rows_TV.stride(0), room) else vocab_size

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.products_TV.device)


def _find(
    rows: _Rows,
    spec: TargetSpec,
    *,
    width: int | None = None,
    run: Callable[..., None] = run_kernel,
) -> _Found:
    """One pass over the logits, then what is left of them."""
    assert spec.k <= MOST_ENTRIES, "more entries take another backend"

    # the blocks
    (num_tokens, vocab_size), k = rows.products_TV.shape, spec.k
    width = width or block_width(vocab_size, k)
    picked = _pick(rows, spec, width=width, run=run)
    found_TK, rest_sums_TM, each = picked.found_TK, picked.rest_sums_TM, (num_tokens,)

    # their entries that may be kept
    room = max(1, triton.next_power_of_2(_ROOM_PER_ENTRY * k))
    chunk_blocks = min(triton.next_power_of_2(max(1, k)), _GATHERED_LOGITS // width)
    keys_TC = rows.empty(num_tokens, room, dtype=torch.int64)
    counts_T = rows.empty(num_tokens, dtype=torch.int32)
    sizes = {"K": k, "C": room, "B": width, "CHUNK": chunk_blocks, "HAS_SOFTCAP": rows.has_softcap}
    gathered = (found_TK, picked.least_T, keys_TC, counts_T)
    run(kernels.gather, each, *rows.arguments, *gathered, **sizes)

    # the target
    ids_TK = rows.empty(num_tokens, k, dtype=torch.int32)
    values_TK, logprobs_TK = rows.empty(num_tokens, k), rows.empty(num_tokens, k)
    tails_2T = rows.empty(2, num_tokens)
    log_sum_T = rows.empty(num_tokens, dtype=torch.float64)
    doubtful_T = rows.empty(num_tokens, dtype=torch.bool)
    num_counted = num_tokens if spec.weighted else 0
    num_kept_TM = rows.empty(num_counted, rest_sums_TM.shape[1], dtype=torch.int16)
    if spec.weighted:
        num_kept_TM.zero_()  # the kernel counts in the found blocks
    inputs = (found_TK, keys_TC, counts_T, picked.top_T, picked.rests_2T)
    outputs = (ids_TK, values_TK, rest_sums_TM, num_kept_TM)
    numbers = (logprobs_TK, tails_2T, log_sum_T, doubtful_T)
    scale = (rest_sums_TM.shape[1], *_two_floats(1.0 / spec.temperature))
    asked = {"HAS_ENTROPY": spec.tail_entropy, "WEIGHTED": spec.weighted}
    arguments = (*rows.arguments, *scale, *inputs, *outputs, *numbers)
    run(kernels.finish, each, *arguments, **sizes, **asked)
    raw = RawTopK(ids_TK, values_TK, picked.top_T, rest_sums_TM, block_ids=width)
    return _Found(raw, logprobs_TK, tails_2T, num_kept_TM, log_sum_T, doubtful_T)


def _pick(rows: _Rows, spec: TargetSpec, *, width: int, run: Callable[..., None]) -> _Picked:
    """Read every logit, then look at every block."""
    # sizes
    (num_tokens, vocab_size), k = rows.products_TV.shape, spec.k
    num_blocks = triton.cdiv(vocab_size, width)
    assert num_blocks < 1 << 15, "`pick` counts blocks in 15 bits"
    tile_blocks = _TILE_LOGITS // width
    inverse, _ = _two_floats(1.0 / spec.temperature)
    asked = {"HAS_ENTROPY": spec.tail_entropy}

    # every logit
    maxima_TM, sums_TM, rest_sums_TM = (rows.empty(num_tokens, num_blocks) for _ in range(3))
    moments_TM = rows.empty(num_tokens if spec.tail_entropy else 0, num_blocks)
    blocks = (maxima_TM, sums_TM, moments_TM, num_blocks, inverse)
    tiles = (num_tokens, triton.cdiv(num_blocks, tile_blocks))
    sizes = {"B": width, "TILE": tile_blocks, "HAS_SOFTCAP": rows.has_softcap}
    run(kernels.read, tiles, *rows.arguments, rows.readable, *blocks, **sizes, **asked)

    # every block
    found_TK = rows.empty(num_tokens, k, dtype=torch.int32)
    least_T, top_T = rows.empty(num_tokens, dtype=torch.int32), rows.empty(num_tokens)
    rests_2T = rows.empty(2, num_tokens, dtype=torch.float64)
    picked = (found_TK, least_T, top_T, rest_sums_TM, rests_2T)
    sizes = {"K": k, "BITS": rows.searched_bits} | _all_blocks(num_blocks)
    run(kernels.pick, (num_tokens,), *blocks, *picked, **sizes, **asked)
    return _Picked(*picked)


def _draw(
    rows: _Rows, found: _Found, seeds_T: Tensor, spec: TargetSpec, *, run: Callable[..., None]
) -> Tensor:
    """int32 [T, N] draws; any ids where the row is doubtful."""
    raw = found.raw
    num_tokens, num_blocks = raw.rest_sums_TM.shape
    draws_TN = rows.empty(num_tokens, spec.num_draws, dtype=torch.int32)
    if spec.num_draws == 0:
        return draws_TN
    inverse, _ = _two_floats(1.0 / spec.temperature)
    blocks, entries = (raw.rest_sums_TM, found.num_kept_TM), (raw.token_ids_TK, raw.logits_TK)
    run(
        draw,
        (num_tokens, triton.cdiv(spec.num_draws, _DRAWS_AT_ONCE)),
        *rows.arguments,
        *(num_blocks, inverse, *blocks, *entries, seeds_T, spec.num_draws, draws_TN),
        K=spec.k,
        B=raw.block_ids,
        D=_DRAWS_AT_ONCE,
        HAS_SOFTCAP=rows.has_softcap,
        WEIGHTED=spec.weighted,
        **_all_blocks(num_blocks),
    )
    return draws_TN


def _look_up(
    rows: _Rows, found: _Found, ids_TX: Tensor, spec: TargetSpec, *, run: Callable[..., None]
) -> Tensor:
    """float32 [T, X]: log p of some ids; any numbers where the row is doubtful."""
    num_tokens, num_ids = ids_TX.shape
    logprobs_TX = rows.empty(num_tokens, num_ids)
    products_TV, row_stride, _, *curve = rows.arguments
    scale = (*curve, *_two_floats(1.0 / spec.temperature))
    inputs = (found.raw.rest_base_T, found.log_sum_T, ids_TX.contiguous(), num_ids)
    sizes = {"X": triton.next_power_of_2(num_ids), "HAS_SOFTCAP": rows.has_softcap}
    run(look_up, (num_tokens,), products_TV, row_stride, *scale, *inputs, logprobs_TX, **sizes)
    return logprobs_TX


def _all_blocks(num_blocks: int) -> dict[str, int]:
    """Options of kernels that hold all blocks of a row: more warps where registers are the
    limit."""
    padded: int = triton.next_power_of_2(num_blocks)
    return {"M": padded, "num_warps": max(4, min(16, padded // _BLOCKS_PER_WARP))}


def _two_floats(number: float) -> tuple[float, float]:
    """A number in float32, and what that loses of it."""
    nearest = c_float(number).value
    return nearest, number - nearest


@cache
def self_test_failure(
    device: torch.device,
    *,
    vocab_size: int,
    k: int,
    dtype: torch.dtype,
    row_stride: int,
    launch: Callable[..., tuple[RawTopK, Tensor]] = launch,
) -> str | None:
    """Compile the kernels for such logits and compare them with `blockmax_torch`; None if right.

    Takes some seconds. The answer is cached, with a failure that is for good. A failure that may
    pass, such as too little memory, is raised, and the next call tries again: a device without
    memory for four rows has none for the logits either.
    """
    # four rows by the kernels
    exact_TV = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        logits_TV = torch.empty_strided(
            exact_TV.shape, (row_stride, 1), dtype=dtype, device=device
        ).copy_(exact_TV)
        ours, again_T = launch(logits_TV, k=k, temperature=2.0)
        ids_TK, base_T = ours.token_ids_TK.cpu(), ours.rest_base_T.cpu()
        sums_T, sure_T = ours.rest_sums_TM.sum(dim=1).cpu(), ~again_T.cpu()
    except Exception as failure:  # of a compiler, a driver or a device: there is another backend
        if may_pass(failure):
            raise
        return (
            f"triton {triton.__version__} fails on {device}: {type(failure).__name__}: "
            f"{next(iter(str(failure).splitlines()), '')}"
        )

    # the same by torch, and its sums relative to the kernels' bases
    exact = blockmax_torch.split(exact_TV, k=k, temperature=2.0)
    exact_sums_T = exact.rest_sums_TM.sum(dim=1) * ((exact.rest_base_T - base_T) / 2.0).exp()
    same_ids = torch.equal(ids_TK[sure_T], exact.token_ids_TK[sure_T])
    same_sums = torch.allclose(sums_T[sure_T], exact_sums_T[sure_T], rtol=1e-5)
    if sure_T.any() and same_ids and same_sums:
        return None
    return f"triton {triton.__version__} answers wrongly on {device}"
