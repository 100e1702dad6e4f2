"""The two passes over a block of logits on a GPU, one kernel each: bfloat16 products are read as
they are, and become their gradient.

Sums are in float32. A kept id is marked by -inf among the products, which no finite head makes: it
adds nothing, and gets no gradient here. The kernels need nothing newer than Triton 3.6, and also
run in Triton's interpreter.

Shapes: C tokens of one block, K kept entries, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillhouse.logits import Head
from stillhouse.logits.launching import may_pass, run_kernel
from stillhouse.losses.head_passes_torch import Passes, Shares, Tail, TorchPasses

_TILE_LOGITS = 4096  # that a program holds at one time
_NUM_WARPS = 8
_ROW_MULTIPLE = 64  # logits: a whole number of cache lines
_NO_LOGIT = torch.finfo(
    torch.float32
).min  # the peak of an empty tail: finite, so that nothing becomes NaN
_NO_SUM = torch.finfo(torch.float32).tiny


class TritonPasses:
    """`read_` reads each product once, `write_` reads and writes each once. For a head of any
    floating dtype but float64.

    Rows are whole cache lines apart, whatever the vocabulary, for the sake of the loads and of the
    matrix products; what lies between them is always -inf, so that no kernel looks where a row
    ends.
    """

    def __init__(self, head: Head, num_tokens: int, *, temperature: float, text: bool):
        width = triton.cdiv(head.vocab_size, _ROW_MULTIPLE) * _ROW_MULTIPLE
        rows_CW = head.weight_VH.new_empty((num_tokens, width))
        rows_CW[:, head.vocab_size :] = -torch.inf
        self.products_CV = rows_CW[:, : head.vocab_size]
        self._bend = (head.scale, head.softcap or 1.0, 1.0 / temperature)
        self._options: dict[str, Any] = {
            "CAPPED": head.softcap is not None,
            "TEXT": text and temperature != 1.0,
            "TILE": _TILE_LOGITS,
        }

    def read_(self, products_CV: Tensor, ids_CK: Tensor) -> Tail:
        products_CV.scatter_(1, ids_CK, -torch.inf)
        num_tokens, width = products_CV.shape[0], products_CV.stride(0)
        peak_C1, sum_C1, text_sum_C1 = (
            torch.empty((num_tokens, 1), device=products_CV.device) for _ in range(3)
        )
        tails = (peak_C1, sum_C1, text_sum_C1)
        run_kernel(
            _read,
            (num_tokens,),
            products_CV,
            width,
            *tails,
            *self._bend,
            **self._options,
            num_warps=_NUM_WARPS,
        )
        return Tail(
            peak_C1.clamp_(min=_NO_LOGIT),
            sum_C1.clamp_(min=_NO_SUM),
            text_sum_C1.clamp_(min=_NO_SUM) if self._options["TEXT"] else sum_C1,
        )

    def write_(self, products_CV: Tensor, shares: Shares) -> Tensor:
        (num_tokens, vocab_size), width = products_CV.shape, products_CV.stride(0)
        tiles = (num_tokens, triton.cdiv(width, _TILE_LOGITS))
        run_kernel(
            _write,
            tiles,
            products_CV,
            width,
            vocab_size,
            *shares,
            *self._bend,
            **self._options,
            num_warps=_NUM_WARPS,
        )
        return products_CV


@cache
def defect(
    device: torch.device, *, make_passes: Callable[..., Passes] = TritonPasses
) -> str | None:
    """What is wrong with the kernels on this device, or None. Compiles them, for some seconds, and
    holds them to `TorchPasses`.

    What is wrong for good is remembered. A failure that may pass is raised, and the next call tries
    again.
    """
    for softcap, temperature in ((None, 1.0), (5.0, 2.0)):
        head = Head(
            torch.empty((_TILE_LOGITS + 501, 0), dtype=torch.bfloat16, device=device),
            scale=0.5,
            softcap=softcap,
        )
        try:
            found = _tried(make_passes(head, 3, temperature=temperature, text=True), head)
        except (
            Exception
        ) as failure:  # whatever a compiler, a driver or a device may raise: there is another path
            if may_pass(failure):
                raise
            return (
                f"triton {triton.__version__} fails on {device}: {type(failure).__name__}: "
                f"{str(failure).splitlines()[:1]}"
            )
        wanted = _tried(TorchPasses(head, 3, temperature=temperature, text=True), head)
        if not all(
            torch.allclose(ours, theirs, rtol=2e-2, atol=1e-4)
            for ours, theirs in zip(found, wanted, strict=True)
        ):
            return f"triton {triton.__version__} answers wrongly on {device}"
    return None


def _tried(passes: Passes, head: Head) -> list[Tensor]:
    """All that both passes make of three tokens with logits of the usual size."""
    random, device = torch.Generator().manual_seed(0), head.weight_VH.device
    products_CV = passes.products_CV.copy_(8 * torch.randn(3, head.vocab_size, generator=random))
    ids_CK = torch.randint(head.vocab_size, (3, 5), generator=random).to(device)
    share_C1, text_share_C1 = torch.rand(2, 3, 1, generator=random).to(device)
    tail = passes.read_(products_CV, ids_CK)
    gradient_CV = passes.write_(products_CV, Shares(tail.peak_C1, share_C1, text_share_C1))
    return [*tail, gradient_CV.float().scatter(1, ids_CK, 0.0)]


@triton.jit
def _logits(
    row: tl.tensor,
    ids: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
) -> tl.tensor:
    """A tile's logits, -inf where there is none, and their slopes in the products."""
    product = tl.load(row + ids, mask=ids < width, other=-float("inf")).to(tl.float32)
    logit = product * scale
    slope = tl.full(logit.shape, 1.0, tl.float32) * scale
    if CAPPED:
        bent = 2.0 * tl.sigmoid(2.0 * logit / softcap) - 1.0  # tanh
        logit = bent * softcap
        slope = (1.0 - bent * bent) * scale
    return tl.where(product == -float("inf"), -float("inf"), logit), slope


@triton.jit
def _read(
    products: tl.tensor,
    width: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    text_sums: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    inverse: tl.tensor,
    CAPPED: tl.constexpr,
    TEXT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    peak = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    text_total = tl.full((), 0.0, tl.float32)
    for start in range(0, width, TILE):
        logit, _ = _logits(
            products + token * width, start + tl.arange(0, TILE), width, scale, softcap, CAPPED
        )
        old, peak = peak, tl.maximum(peak, tl.max(logit, axis=0))
        base = tl.where(peak == -float("inf"), 0.0, peak)  # -inf - -inf would be NaN
        total = total * tl.exp((old - base) * inverse) + tl.sum(
            tl.exp((logit - base) * inverse), axis=0
        )
        if TEXT:
            text_total = text_total * tl.exp(old - base) + tl.sum(tl.exp(logit - base), axis=0)
    tl.store(peaks + token, peak)
    tl.store(sums + token, total)
    tl.store(text_sums + token, text_total)


@triton.jit
def _write(
    products: tl.tensor,
    width: tl.tensor,
    vocab_size: tl.tensor,
    peaks: tl.tensor,
    shares: tl.tensor,
    text_shares: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    inverse: tl.tensor,
    CAPPED: tl.constexpr,
    TEXT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    logit, slope = _logits(products + token * width, ids, width, scale, softcap, CAPPED)
    below = logit - tl.load(peaks + token)
    gradient = tl.load(shares + token) * tl.exp(below * inverse)
    if TEXT:
        gradient += tl.load(text_shares + token) * tl.exp(below)
    gradient = tl.where(logit == -float("inf"), 0.0, gradient * slope)
    gradient = tl.where(ids < vocab_size, gradient, -float("inf"))
    tl.store(
        products + token * width + ids, gradient.to(products.dtype.element_ty), mask=ids < width
    )
