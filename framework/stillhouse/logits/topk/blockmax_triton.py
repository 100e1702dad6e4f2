"""Block-max filter in Triton: an exact top-k that reads each logit once, and the target from it.

Shapes: T tokens, V vocabulary, K kept entries, N draws, B ids of a block, M blocks of a row, C
candidates that there is room for. The algorithm, and why it is exact, are in `blockmax_torch`.

    kernel  programs   reads          writes
    read    T x tiles  every logit    each block's maximum and sum of exponentials
    pick    T          M maxima       the K blocks with the top-k, and the sums of the other blocks
    gather  T          K B logits     candidates: entries that reach the K-th maximum, about 1.3 K
    finish  T          C candidates,  ids and log-probabilities in order, the tail's, the doubt, and
                       K B logits     the sums of the K blocks without the kept entries
    draw    T x N / D  M sums,        D draws
                       D B logits

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
from dataclasses import dataclass
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
class _Found:
    """A block of rows: their top-k, and their target but for draws."""

    raw: RawTopK
    logprobs_TK: Tensor
    tail_logmass_T: Tensor
    doubtful_T: Tensor


def launch(
    logits_TV: Tensor, *, k: int, temperature: float, width: int | None = None
) -> tuple[RawTopK, Tensor]:
    """The top-k of logits that are not `too_small`, and bool [T]: the doubtful rows. Asynchronous.

    K is at most MOST_ENTRIES. `width` overrides `block_width`: a power of two of which V has at
    least 2 K.
    """
    found = _find(_Rows.of(logits_TV, AS_IT_IS), k=k, temperature=temperature, width=width)
    return found.raw, found.doubtful_T


def compress_block(
    products_TV: Tensor,
    curve: Curve,
    spec: TargetSpec,
    *,
    seeds_T: Tensor,
    run: Callable[..., None] = run_kernel,
) -> tuple[CompressedLogits, Tensor]:
    """Targets of the logits that `curve` makes of products, with blind draws, and bool [T]: the
    doubtful rows. Asynchronous.

    A curve that falls is applied by torch before, since no maximum of products is one of logits.
    `run` is called as `run_kernel` is.
    """
    if curve.scale <= 0:
        products_TV, curve = curve.logits(products_TV), AS_IT_IS
    rows = _Rows.of(products_TV, curve)
    found = _find(rows, k=spec.k, temperature=spec.temperature, run=run)
    draws_TN = _draw(rows, found.raw, seeds_T, spec, run=run)
    target = CompressedLogits(
        found.raw.token_ids_TK,
        found.logprobs_TK,
        found.tail_logmass_T,
        draws_TN,
        vocab_size=spec.vocab_size,
        temperature=spec.temperature,
    )
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
    *,
    k: int,
    temperature: float,
    width: int | None = None,
    run: Callable[..., None] = run_kernel,
) -> _Found:
    """One pass over the logits, then what is left of them."""
    assert k <= MOST_ENTRIES, "more entries take another backend"

    # sizes
    num_tokens, vocab_size = rows.products_TV.shape
    width = width or block_width(vocab_size, k)
    num_blocks, room = triton.cdiv(vocab_size, width), triton.next_power_of_2(_ROOM_PER_ENTRY * k)
    assert num_blocks < 1 << 15, "`pick` counts blocks in 15 bits"
    tile_blocks = _TILE_LOGITS // width
    chunk_blocks = min(triton.next_power_of_2(max(1, k)), _GATHERED_LOGITS // width)

    # buffers
    maxima_TM, sums_TM, rest_sums_TM = (rows.empty(num_tokens, num_blocks) for _ in range(3))
    found_TK, ids_TK = (rows.empty(num_tokens, k, dtype=torch.int32) for _ in range(2))
    least_T, counts_T = (rows.empty(num_tokens, dtype=torch.int32) for _ in range(2))
    top_T, tail_T = rows.empty(num_tokens), rows.empty(num_tokens)
    rest_T = rows.empty(num_tokens, dtype=torch.float64)
    keys_TC = rows.empty(num_tokens, max(1, room), dtype=torch.int64)
    values_TK, logprobs_TK = rows.empty(num_tokens, k), rows.empty(num_tokens, k)
    doubtful_T = rows.empty(num_tokens, dtype=torch.bool)

    # kernels
    inverse, inverse_low = _two_floats(1.0 / temperature)
    scale, each = (num_blocks, inverse), (num_tokens,)
    softcap = {"HAS_SOFTCAP": rows.has_softcap}
    found = (maxima_TM, sums_TM, *scale)
    tiles = (num_tokens, triton.cdiv(num_blocks, tile_blocks))
    reading = {"B": width, "TILE": tile_blocks} | softcap
    run(kernels.read, tiles, *rows.arguments, rows.readable, *found, **reading)
    picked = (found_TK, least_T, top_T, rest_sums_TM, rest_T)
    run(
        kernels.pick, each, *found, *picked, K=k, BITS=rows.searched_bits, **_all_blocks(num_blocks)
    )
    sizes = {"K": k, "C": max(1, room), "B": width, "CHUNK": chunk_blocks} | softcap
    run(kernels.gather, each, *rows.arguments, found_TK, least_T, keys_TC, counts_T, **sizes)
    inputs = (found_TK, keys_TC, counts_T, top_T, rest_T)
    outputs = (ids_TK, values_TK, rest_sums_TM, logprobs_TK, tail_T, doubtful_T)
    run(kernels.finish, each, *rows.arguments, *scale, inverse_low, *inputs, *outputs, **sizes)
    raw = RawTopK(ids_TK, values_TK, top_T, rest_sums_TM, block_ids=width)
    return _Found(raw, logprobs_TK, tail_T, doubtful_T)


def _draw(
    rows: _Rows, raw: RawTopK, seeds_T: Tensor, spec: TargetSpec, *, run: Callable[..., None]
) -> Tensor:
    """int32 [T, N] draws; any ids where the row is doubtful."""
    num_tokens, num_blocks = raw.rest_sums_TM.shape
    draws_TN = rows.empty(num_tokens, spec.num_draws, dtype=torch.int32)
    if spec.num_draws == 0:
        return draws_TN
    inverse, _ = _two_floats(1.0 / spec.temperature)
    inputs = (num_blocks, inverse, raw.rest_sums_TM, raw.token_ids_TK, raw.logits_TK, seeds_T)
    grid = (num_tokens, triton.cdiv(spec.num_draws, _DRAWS_AT_ONCE))
    run(
        kernels.draw,
        grid,
        *rows.arguments,
        *inputs,
        spec.num_draws,
        draws_TN,
        K=spec.k,
        B=raw.block_ids,
        D=_DRAWS_AT_ONCE,
        HAS_SOFTCAP=rows.has_softcap,
        **_all_blocks(num_blocks),
    )
    return draws_TN


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
