"""Block-max filter in Triton: an exact top-k that reads each logit once.

Shapes: T tokens, V vocabulary, K kept entries, B ids of a block, M blocks of a row, C candidates
that there is room for. The algorithm, and why it is exact, are in `blockmax_torch`.

    kernel  programs   reads          writes
    read    T x tiles  every logit    each block's maximum and sum of exponentials
    pick    T          M maxima       the K blocks with the top-k, and the sums of the other blocks
    gather  T          K B logits     candidates: entries that reach the K-th maximum, about 1.3 K
    rank    T          C candidates,  ids and logits in order, and the sums of the K blocks without
                       K B logits     the kept entries

Kernels communicate through global memory, one launch after the other, so no kernel waits for its
own writes. The sort key of an entry is one int64: the value's bits, as an integer of the same
order, above the id counted from the end.

A row is doubtful, to be compressed another way, if it has more candidates than room, or if its rest
is too faint for float32 beside its maximum; no other row is. All kernels also run in Triton's
interpreter, on the CPU.
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

# Of K; above it `_pick` and `_rank` need more registers than there are, and minutes of compiling.
MOST_ENTRIES = 512
_TILE_LOGITS = 4096  # read by one program of `_read`
_GATHERED_LOGITS = 2048  # read at a time by `_gather` and `_rank`
_ROOM_PER_ENTRY = 4  # candidates for each kept entry; language models' logits had 1.7 at most
_LEAST_SUM = 1e-30  # of exponentials relative to a row's maximum: below, float32 loses their digits
_WIDTHS = (16, 128)  # the least and the greatest width of a block
# An id XOR this one counts from the end, so that ties go to the lowest id.
_LAST_ID = tl.constexpr(2**31 - 1)
_NO_KEY = tl.constexpr(-(2**63))
_LEAST_ORDER = tl.constexpr(-(2**31))


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


def launch(
    logits_TV: Tensor, *, k: int, temperature: float, width: int | None = None
) -> tuple[RawTopK, Tensor]:
    """The top-k of logits that are not `too_small`, and bool [T]: the doubtful rows. Asynchronous.

    K is at most MOST_ENTRIES. `width` overrides `block_width`: a power of two of which V has at
    least 2 K.
    """
    assert k <= MOST_ENTRIES, "more entries take another backend"

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_TV.device)

    # sizes
    num_tokens, vocab_size = logits_TV.shape
    logits_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    width = width or block_width(vocab_size, k)
    num_blocks, room = triton.cdiv(vocab_size, width), triton.next_power_of_2(_ROOM_PER_ENTRY * k)
    tile_blocks = _TILE_LOGITS // width
    chunk_blocks = min(triton.next_power_of_2(k), _GATHERED_LOGITS // width)

    # buffers
    maxima_TM, sums_TM, rest_sums_TM = (empty(num_tokens, num_blocks) for _ in range(3))
    found_TK, ids_TK = (empty(num_tokens, k, dtype=torch.int32) for _ in range(2))
    least_T, top_T = empty(num_tokens, dtype=torch.int32), empty(num_tokens)
    keys_TC = empty(num_tokens, room, dtype=torch.int64)
    counts_T = torch.zeros(num_tokens, dtype=torch.int32, device=logits_TV.device)
    values_TK = empty(num_tokens, k)

    # kernels: one pass over the logits, then what is left of them
    rows = (logits_TV, logits_TV.stride(0), vocab_size)
    scale = (num_blocks, 1.0 / temperature)
    each, tiles = (num_tokens,), (num_tokens, triton.cdiv(num_blocks, tile_blocks))
    run_kernel(_read, tiles, *rows, maxima_TM, sums_TM, *scale, B=width, TILE=tile_blocks)
    picked = (found_TK, least_T, top_T, rest_sums_TM)
    padded = triton.next_power_of_2(num_blocks)
    run_kernel(_pick, each, maxima_TM, sums_TM, *scale, *picked, K=k, M=padded)
    if k:
        sizes = {"K": k, "C": room, "B": width, "CHUNK": chunk_blocks}
        run_kernel(_gather, each, *rows, found_TK, least_T, keys_TC, counts_T, **sizes)
        candidates, outputs = (keys_TC, counts_T, top_T), (ids_TK, values_TK, rest_sums_TM)
        run_kernel(_rank, each, *rows, *scale, found_TK, *candidates, *outputs, **sizes)
    raw = RawTopK(ids_TK, values_TK, top_T, rest_sums_TM, block_ids=width)
    return raw, (counts_T > room) | (rest_sums_TM.sum(dim=1) < _LEAST_SUM)


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


@triton.jit
def _ordered(z: tl.tensor) -> tl.tensor:
    """int64 in the order of the float32; -0 as +0."""
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
    """Logits [CHUNK * B] of the row's found blocks from number `start` on, their ids, and whether
    they exist."""
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
    """A tile of blocks: each one's maximum, and sum of exp((z - maximum) / temperature)."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ids = blocks[:, None] * B + tl.arange(0, B)[None, :]
    z = tl.load(logits + row * row_stride + ids, mask=ids < vocab_size, other=-float("inf"))
    z = z.to(tl.float32)
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
    """The K blocks with the greatest maxima, the K-th maximum, and the sums of the other blocks."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, M)
    exist = blocks < num_blocks
    maximum = tl.load(maxima + row * num_blocks + blocks, mask=exist, other=-float("inf"))
    total = tl.load(sums + row * num_blocks + blocks, mask=exist, other=0.0)

    # the K-th maximum: the greatest number that at least K maxima reach, from its highest bit down
    order = tl.where(exist, _ordered(maximum), _LEAST_ORDER - 1)
    threshold = tl.full((), _LEAST_ORDER, tl.int64)
    for i in range(32):
        candidate = threshold + (tl.full((), 1, tl.int64) << (31 - i))
        num_reaching = tl.sum((order >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(num_reaching >= K, candidate, threshold)

    # all blocks above it, and the first of those that equal it
    above, level = (order > threshold).to(tl.int32), (order == threshold).to(tl.int32)
    room = K - tl.sum(above, axis=0)
    taken = above + level * (tl.cumsum(level, axis=0) <= room).to(tl.int32)
    tl.store(found + row * K + tl.cumsum(taken, axis=0) - 1, blocks, mask=taken != 0)

    # the other blocks' sums, relative to the row's maximum
    top = tl.max(maximum, axis=0)
    base = tl.where(top == -float("inf"), 0.0, top)
    tl.store(least + row, threshold.to(tl.int32))
    tl.store(tops + row, top)
    left = total * tl.exp((maximum - base) * inverse)
    tl.store(rest_sums + row * num_blocks + blocks, left, mask=exist & (taken == 0))


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
    """The keys of the found blocks' entries that reach the K-th maximum, and how many there are."""
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(least + row).to(tl.int64)
    count = tl.full((), 0, tl.int32)
    for start in range(0, K, CHUNK):
        z, ids, exist = _entries(logits, row, row_stride, vocab_size, found, start, K, B, CHUNK)
        order = _ordered(z)
        reach = (exist & (order >= threshold)).to(tl.int32)
        places = count + tl.cumsum(reach, axis=0) - 1
        key = (order << 32) | (ids ^ _LAST_ID).to(tl.int64)
        tl.store(keys + row * C + places, key, mask=(reach != 0) & (places < C))
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
    """The K greatest candidates, and the found blocks' sums without them."""
    # the candidates, sorted, back to ids and logits
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, C)
    key = tl.load(keys + row * C + places, mask=places < tl.load(counts + row), other=_NO_KEY)
    key = tl.sort(key, descending=True)
    bits = (key >> 32).to(tl.int32)
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    ids_of_keys = ((key & _LAST_ID) ^ _LAST_ID).to(tl.int32)
    tl.store(ids_out + row * K + places, ids_of_keys, mask=places < K)
    tl.store(values_out + row * K + places, values, mask=places < K)

    # what is not kept: entries whose key is below the last kept one
    last = tl.sum(tl.where(places == K - 1, key, 0), axis=0)
    top = tl.load(tops + row)
    base = tl.where(top == -float("inf"), 0.0, top)
    for start in range(0, K, CHUNK):
        z, ids, exist = _entries(logits, row, row_stride, vocab_size, found, start, K, B, CHUNK)
        kept = ((_ordered(z) << 32) | (ids ^ _LAST_ID).to(tl.int64)) >= last
        left = tl.where(kept | (exist == 0), 0.0, tl.exp((z - base) * inverse))
        which = start + tl.arange(0, CHUNK)
        blocks = tl.load(found + row * K + which, mask=which < K, other=0)
        sums = tl.sum(tl.reshape(left, [CHUNK, B]), axis=1)
        tl.store(rest_sums + row * num_blocks + blocks, sums, mask=which < K)
