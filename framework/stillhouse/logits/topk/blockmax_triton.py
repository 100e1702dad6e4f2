"""The block-max filter on a GPU: one kernel reads each logit once, three small ones look again at
the few blocks that matter.

Shapes: T tokens, V vocabulary, K kept entries, B a block's width, M blocks of a row, C candidates
that there is room for.

    read       T x tiles   every logit        each block's maximum, and its sum of exp((z - maximum)
    / temperature) pick       T           M maxima           the K blocks that hold the top-k (see
    `blockmax_torch`), and the sums of the others gather     T           K B logits         the
    entries that reach the K-th maximum: about 1.3 K of them rank       T           those, K B
    logits  ids and logits in order, and the found blocks' sums of what is not kept

Kernels that follow one another meet only in memory, so no kernel waits for its own writes. An entry
is one int64: the value's bits, made to order as integers, above the id counted from the end. A row
with more candidates than room, or whose rest is too faint for float32 beside its maximum, has to be
done again another way; nothing else ever has. Everything also runs in Triton's interpreter.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillhouse.logits.launching import may_pass, run_kernel
from stillhouse.logits.topk import blockmax_torch
from stillhouse.logits.topk.found import RawTopK

# kept; above it `_pick` and `_rank` need more registers than there are, and minutes of compiling
MOST_ENTRIES = 512
_TILE_LOGITS = 4096  # read by one program at a time
_GATHERED_LOGITS = 2048
_ROOM_PER_ENTRY = (
    4  # candidates for each kept entry; on logits of language models at most 1.7 were counted
)
_LEAST_SUM = 1e-30  # of exponentials relative to a row's maximum: below, float32 loses their digits
_WIDTHS = (16, 128)  # the least and the greatest width of a block
# an id and this one, each bit the other way round: ties go to the lowest id
_LAST_ID = tl.constexpr(2**31 - 1)
_NO_KEY = tl.constexpr(-(2**63))
_LEAST_ORDER = tl.constexpr(-(2**31))


def block_width(vocab_size: int, k: int) -> int:
    """The power of two next above sqrt(V / K), at which the maxima and the entries of K blocks are
    about as many, within limits."""
    least, most = _WIDTHS
    width: int = triton.next_power_of_2(int((vocab_size / max(1, k)) ** 0.5))
    return max(least, min(most, width))


def too_small(vocab_size: int, k: int) -> str | None:
    """Why blocks would filter nothing, or None."""
    num_blocks = vocab_size // block_width(vocab_size, k)
    return (
        None
        if num_blocks >= 2 * max(1, k)
        else f"{vocab_size} logits are too few blocks to filter for {k}"
    )


def launch(
    logits_TV: Tensor, *, k: int, temperature: float, width: int | None = None
) -> tuple[RawTopK, Tensor]:
    """The top-k of logits for which nothing is `too_small`, and bool [T]: the rows that have to be
    done again. Waits for nothing.

    K is at most MOST_ENTRIES. `width` overrides `block_width`: a power of two of which V has at
    least 2 k.
    """
    assert k <= MOST_ENTRIES, "more entries take another path"
    num_tokens, vocab_size = logits_TV.shape
    logits_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    width = width or block_width(vocab_size, k)
    num_blocks, room = triton.cdiv(vocab_size, width), triton.next_power_of_2(_ROOM_PER_ENTRY * k)
    tile_blocks, chunk_blocks = (
        _TILE_LOGITS // width,
        min(triton.next_power_of_2(k), _GATHERED_LOGITS // width),
    )

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_TV.device)

    maxima_TM, sums_TM, rest_sums_TM = (empty(num_tokens, num_blocks) for _ in range(3))
    found_TK, least_T, top_T = (
        empty(num_tokens, k, dtype=torch.int32),
        empty(num_tokens, dtype=torch.int32),
        empty(num_tokens),
    )
    keys_TC, counts_T = (
        empty(num_tokens, room, dtype=torch.int64),
        torch.zeros(num_tokens, dtype=torch.int32, device=logits_TV.device),
    )
    ids_TK, values_TK = empty(num_tokens, k, dtype=torch.int32), empty(num_tokens, k)

    rows = (logits_TV, logits_TV.stride(0), vocab_size)
    blocks = {"K": k, "B": width, "CHUNK": chunk_blocks}
    inverse, padded = 1.0 / temperature, triton.next_power_of_2(num_blocks)
    each = (num_tokens,)
    tiles = (num_tokens, triton.cdiv(num_blocks, tile_blocks))
    run_kernel(
        _read, tiles, *rows, maxima_TM, sums_TM, num_blocks, inverse, B=width, TILE=tile_blocks
    )
    run_kernel(
        _pick,
        each,
        maxima_TM,
        sums_TM,
        num_blocks,
        inverse,
        found_TK,
        least_T,
        top_T,
        rest_sums_TM,
        K=k,
        M=padded,
    )
    if k:
        run_kernel(_gather, each, *rows, found_TK, least_T, keys_TC, counts_T, C=room, **blocks)
        outputs = (ids_TK, values_TK, rest_sums_TM)
        run_kernel(
            _rank,
            each,
            *rows,
            num_blocks,
            inverse,
            found_TK,
            keys_TC,
            counts_T,
            top_T,
            *outputs,
            C=room,
            **blocks,
        )
    raw = RawTopK(ids_TK, values_TK, top_T, rest_sums_TM, block_ids=width)
    return raw, (counts_T > room) | (rest_sums_TM.sum(dim=1) < _LEAST_SUM)


@cache
def defect(
    device: torch.device,
    *,
    vocab_size: int,
    k: int,
    dtype: torch.dtype,
    row_stride: int,
    launch: Callable[..., tuple[RawTopK, Tensor]] = launch,
) -> str | None:
    """What is wrong with the kernels for such logits here, or None. Compiles them, for some
    seconds, and holds them to `blockmax_torch`.

    What is wrong for good is remembered. A failure that may pass, such as too little memory, is
    raised, and the next call tries again: where there is none for four rows, there is none for the
    logits either.
    """
    exact_TV = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        logits_TV = torch.empty_strided(
            exact_TV.shape, (row_stride, 1), dtype=dtype, device=device
        ).copy_(exact_TV)
        ours, again_T = launch(logits_TV, k=k, temperature=2.0)
        ids_TK, sums_T, sure_T = (
            ours.token_ids_TK.cpu(),
            ours.rest_sums_TM.sum(dim=1).cpu(),
            ~again_T.cpu(),
        )
    except (
        Exception
    ) as failure:  # whatever a compiler, driver or device may raise: there is another path
        if may_pass(failure):
            raise
        return (
            f"triton {triton.__version__} fails on {device}: {type(failure).__name__}: "
            f"{next(iter(str(failure).splitlines()), '')}"
        )
    exact = blockmax_torch.split(exact_TV, k=k, temperature=2.0)
    exact_sums_T = (
        exact.rest_sums_TM.sum(dim=1) * ((exact.rest_base_T - ours.rest_base_T.cpu()) / 2.0).exp()
    )
    same_ids = torch.equal(ids_TK[sure_T], exact.token_ids_TK[sure_T])
    same_sums = torch.allclose(sums_T[sure_T], exact_sums_T[sure_T], rtol=1e-5)
    return (
        None
        if sure_T.any() and same_ids and same_sums
        else f"triton {triton.__version__} answers wrongly on {device}"
    )


@triton.jit
def _ordered(z: tl.tensor) -> tl.tensor:
    """int64 that order as the float32 do; -0 as +0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _entries(
    logits: tl.tensor,
    row: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    found: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """The logits [CHUNK * B] of the row's found blocks from number `start` on, their ids, and which
    of them exist."""
    which = start + tl.arange(0, CHUNK)
    blocks = tl.load(found + row * K + which, mask=which < K, other=0)
    ids = blocks[:, None] * B + tl.arange(0, B)[None, :]
    exist = (which < K)[:, None] & (ids < vocab_size)
    z = tl.load(logits + row * row_stride + ids, mask=exist, other=-float("inf")).to(tl.float32)
    return (
        tl.reshape(z, [CHUNK * B]),
        tl.reshape(ids, [CHUNK * B]),
        tl.reshape(exist.to(tl.int32), [CHUNK * B]) != 0,
    )


@triton.jit
def _read(
    logits: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    num_blocks: tl.tensor,
    inverse: tl.tensor,
    B: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ids = blocks[:, None] * B + tl.arange(0, B)[None, :]
    z = tl.load(logits + row * row_stride + ids, mask=ids < vocab_size, other=-float("inf")).to(
        tl.float32
    )
    top = tl.max(z, axis=1)
    base = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN
    total = tl.sum(tl.exp((z - base[:, None]) * inverse), axis=1)
    tl.store(maxima + row * num_blocks + blocks, top, mask=blocks < num_blocks)
    tl.store(sums + row * num_blocks + blocks, total, mask=blocks < num_blocks)


@triton.jit
def _pick(
    maxima: tl.tensor,
    sums: tl.tensor,
    num_blocks: tl.tensor,
    inverse: tl.tensor,
    found: tl.tensor,
    least: tl.tensor,
    tops: tl.tensor,
    rest_sums: tl.tensor,
    K: tl.constexpr,
    M: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, M)
    exist = blocks < num_blocks
    maximum = tl.load(maxima + row * num_blocks + blocks, mask=exist, other=-float("inf"))
    total = tl.load(sums + row * num_blocks + blocks, mask=exist, other=0.0)
    order = tl.where(exist, _ordered(maximum), _LEAST_ORDER - 1)
    threshold = tl.full((), _LEAST_ORDER, tl.int64)
    for i in range(
        32
    ):  # the greatest number that at least K of them reach, from its highest bit downwards
        candidate = threshold + (tl.full((), 1, tl.int64) << (31 - i))
        threshold = tl.where(
            tl.sum((order >= candidate).to(tl.int32), axis=0) >= K, candidate, threshold
        )
    above, level = (order > threshold).to(tl.int32), (order == threshold).to(tl.int32)
    room = K - tl.sum(above, axis=0)
    taken = above + level * (tl.cumsum(level, axis=0) <= room).to(tl.int32)
    tl.store(found + row * K + tl.cumsum(taken, axis=0) - 1, blocks, mask=taken != 0)
    top = tl.max(maximum, axis=0)
    base = tl.where(top == -float("inf"), 0.0, top)
    tl.store(least + row, threshold.to(tl.int32))
    tl.store(tops + row, top)
    tl.store(
        rest_sums + row * num_blocks + blocks,
        total * tl.exp((maximum - base) * inverse),
        mask=exist & (taken == 0),
    )


@triton.jit
def _gather(
    logits: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    found: tl.tensor,
    least: tl.tensor,
    keys: tl.tensor,
    counts: tl.tensor,
    K: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(least + row).to(tl.int64)
    count = tl.full((), 0, tl.int32)
    for start in range(0, K, CHUNK):
        z, ids, exist = _entries(logits, row, row_stride, vocab_size, found, start, K, B, CHUNK)
        order = _ordered(z)
        reach = (exist & (order >= threshold)).to(tl.int32)
        places = count + tl.cumsum(reach, axis=0) - 1
        tl.store(
            keys + row * C + places,
            (order << 32) | (ids ^ _LAST_ID).to(tl.int64),
            mask=(reach != 0) & (places < C),
        )
        count += tl.sum(reach, axis=0)
    tl.store(counts + row, count)


@triton.jit
def _rank(
    logits: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_blocks: tl.tensor,
    inverse: tl.tensor,
    found: tl.tensor,
    keys: tl.tensor,
    counts: tl.tensor,
    tops: tl.tensor,
    ids_out: tl.tensor,
    values_out: tl.tensor,
    rest_sums: tl.tensor,
    K: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, C)
    key = tl.load(keys + row * C + places, mask=places < tl.load(counts + row), other=_NO_KEY)
    key = tl.sort(key, descending=True)
    bits = (key >> 32).to(tl.int32)
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(
        ids_out + row * K + places, ((key & _LAST_ID) ^ _LAST_ID).to(tl.int32), mask=places < K
    )
    tl.store(values_out + row * K + places, values, mask=places < K)
    last = tl.sum(tl.where(places == K - 1, key, 0), axis=0)
    top = tl.load(tops + row)
    base = tl.where(top == -float("inf"), 0.0, top)
    for start in range(0, K, CHUNK):
        z, ids, exist = _entries(logits, row, row_stride, vocab_size, found, start, K, B, CHUNK)
        kept = ((_ordered(z) << 32) | (ids ^ _LAST_ID).to(tl.int64)) >= last
        left = tl.where(kept | (exist == 0), 0.0, tl.exp((z - base) * inverse))
        which = start + tl.arange(0, CHUNK)
        blocks = tl.load(found + row * K + which, mask=which < K, other=0)
        tl.store(
            rest_sums + row * num_blocks + blocks,
            tl.sum(tl.reshape(left, [CHUNK, B]), axis=1),
            mask=which < K,
        )
