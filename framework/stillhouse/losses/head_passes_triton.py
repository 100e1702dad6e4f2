"""The two passes over a block of logits on a GPU, one Triton kernel each; the plain reference is
`head_passes_torch`.

`_reduce_tail` is an online softmax over each token's products. `_write_grad` overwrites the
products with their gradient. Both read and write 16-bit products as they are, and compute in
float32. A kept id is marked by -inf among the products, which no finite head makes: it adds nothing
to the sums, and gets no gradient here.

The kernels need nothing newer than Triton 3.6, and also run in Triton's interpreter.

Shapes: C tokens of one block, K kept entries, V vocabulary, W row stride in logits.
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
from stillhouse.losses.head_passes_torch import Passes, TailGrad, TailStats, TorchPasses

_TILE_LOGITS = 4096  # of one program at one time
_NUM_WARPS = 8
_ROW_MULTIPLE = 64  # logits: a whole number of cache lines
# peak and sum of an empty tail: finite, so that nothing becomes NaN
_NO_LOGIT = torch.finfo(torch.float32).min
_NO_SUM = torch.finfo(torch.float32).tiny


class TritonPasses:
    """`Passes` in Triton kernels, for a weight of any floating dtype but float64.

    `reduce_tail_` reads each product once, `write_grad_` reads and writes each once. Rows are whole
    cache lines apart, whatever the vocabulary, which loads and matmuls need for their speed. The
    padding between two rows is always -inf, so that kernels need not mask it.
    """

    def __init__(self, head: Head, num_tokens: int, *, temperature: float, label_loss: bool):
        width = triton.cdiv(head.vocab_size, _ROW_MULTIPLE) * _ROW_MULTIPLE
        rows_CW = head.weight_VH.new_empty((num_tokens, width))
        rows_CW[:, head.vocab_size :] = -torch.inf
        self.products_CV = rows_CW[:, : head.vocab_size]
        self._scale_softcap_inverse = (head.scale, head.softcap or 1.0, 1.0 / temperature)
        self._options: dict[str, Any] = {
            "HAS_SOFTCAP": head.softcap is not None,
            "HAS_CE": label_loss and temperature != 1.0,
            "TILE": _TILE_LOGITS,
            "num_warps": _NUM_WARPS,
        }

    def reduce_tail_(self, products_CV: Tensor, ids_CK: Tensor) -> TailStats:
        products_CV.scatter_(1, ids_CK, -torch.inf)
        num_tokens, width = products_CV.shape[0], products_CV.stride(0)
        peak_C1, sum_C1, ce_sum_C1 = (
            torch.empty((num_tokens, 1), device=products_CV.device) for _ in range(3)
        )
        stats = (peak_C1, sum_C1, ce_sum_C1)
        arguments = (products_CV, width, *stats, *self._scale_softcap_inverse)
        run_kernel(_reduce_tail, (num_tokens,), *arguments, **self._options)
        for each_C1, least in zip(stats, (_NO_LOGIT, _NO_SUM, _NO_SUM), strict=True):
            each_C1.clamp_(min=least)
        return TailStats(peak_C1, sum_C1, ce_sum_C1 if self._options["HAS_CE"] else sum_C1)

    def write_grad_(self, products_CV: Tensor, tail: TailGrad) -> Tensor:
        (num_tokens, vocab_size), width = products_CV.shape, products_CV.stride(0)
        arguments = (products_CV, width, vocab_size, *tail, *self._scale_softcap_inverse)
        tiles = (num_tokens, triton.cdiv(width, _TILE_LOGITS))
        run_kernel(_write_grad, tiles, *arguments, **self._options)
        return products_CV


@cache
def self_test_failure(
    device: torch.device, *, make_passes: Callable[..., Passes] = TritonPasses
) -> str | None:
    """Why the kernels cannot be used on this device, or None. Compiles them, which takes seconds,
    and compares them with `TorchPasses`.

    The answer is cached, except that a failure which may pass (such as no memory) is raised, and
    the next call tests again.
    """
    version = f"triton {triton.__version__}"
    for softcap, temperature in ((None, 1.0), (5.0, 2.0)):
        weight_V0 = torch.empty((_TILE_LOGITS + 501, 0), dtype=torch.bfloat16, device=device)
        head = Head(weight_V0, scale=0.5, softcap=softcap)
        options: dict[str, Any] = {"temperature": temperature, "label_loss": True}
        try:
            found = _results_on_sample(make_passes(head, 3, **options), head)
        except Exception as error:  # of a compiler, a driver or a device: torch can do it
            if may_pass(error):
                raise
            lines = str(error).splitlines()[:1]
            return f"{version} fails on {device}: {type(error).__name__}: {lines}"
        wanted = _results_on_sample(TorchPasses(head, 3, **options), head)
        pairs = zip(found, wanted, strict=True)
        if not all(torch.allclose(ours, theirs, rtol=2e-2, atol=1e-4) for ours, theirs in pairs):
            return f"{version} answers wrongly on {device}"
    return None


def _results_on_sample(passes: Passes, head: Head) -> list[Tensor]:
    """All that both passes compute of three random tokens, with logits of the usual size."""
    random, device = torch.Generator().manual_seed(0), head.weight_VH.device
    products_CV = passes.products_CV.copy_(8 * torch.randn(3, head.vocab_size, generator=random))
    ids_CK = torch.randint(head.vocab_size, (3, 5), generator=random).to(device)
    share_C1, ce_share_C1 = torch.rand(2, 3, 1, generator=random).to(device)
    stats = passes.reduce_tail_(products_CV, ids_CK)
    grad_CV = passes.write_grad_(products_CV, TailGrad(stats.peak_C1, share_C1, ce_share_C1))
    return [*stats, grad_CV.float().scatter(1, ids_CK, 0.0)]


@triton.jit
def _logits_and_slopes(
    row: tl.tensor,
    ids: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """A tile's logits, -inf where there is none, and d logit / d product at each."""
    product = tl.load(row + ids, mask=ids < width, other=-float("inf")).to(tl.float32)
    logit = product * scale
    slope = tl.full(logit.shape, 1.0, tl.float32) * scale
    if HAS_SOFTCAP:
        tanh = 2.0 * tl.sigmoid(2.0 * logit / softcap) - 1.0
        logit = tanh * softcap
        slope = (1.0 - tanh * tanh) * scale
    return tl.where(product == -float("inf"), -float("inf"), logit), slope


@triton.jit
def _reduce_tail(
    products: tl.tensor,
    width: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    ce_sums: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    inverse: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program a token: an online softmax, whose sums are rescaled where the peak rises."""
    token = tl.program_id(0).to(tl.int64)
    row = products + token * width
    peak = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    ce_total = tl.full((), 0.0, tl.float32)
    # one tile after another
    for start in range(0, width, TILE):
        ids = start + tl.arange(0, TILE)
        logit, _ = _logits_and_slopes(row, ids, width, scale, softcap, HAS_SOFTCAP)
        old, peak = peak, tl.maximum(peak, tl.max(logit, axis=0))
        base = tl.where(peak == -float("inf"), 0.0, peak)  # -inf - -inf would be NaN
        kept = total * tl.exp((old - base) * inverse)
        total = kept + tl.sum(tl.exp((logit - base) * inverse), axis=0)
        if HAS_CE:
            ce_total = ce_total * tl.exp(old - base) + tl.sum(tl.exp(logit - base), axis=0)
    tl.store(peaks + token, peak)
    tl.store(sums + token, total)
    tl.store(ce_sums + token, ce_total)


@triton.jit
def _write_grad(
    products: tl.tensor,
    width: tl.tensor,
    vocab_size: tl.tensor,
    peaks: tl.tensor,
    shares: tl.tensor,
    ce_shares: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    inverse: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program a tile of one token; the padding of a row stays -inf."""
    # logits and slopes again, from the products
    token = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row = products + token * width
    logit, slope = _logits_and_slopes(row, ids, width, scale, softcap, HAS_SOFTCAP)
    # their gradient; 0 at kept ids
    below = logit - tl.load(peaks + token)
    grad = tl.load(shares + token) * tl.exp(below * inverse)
    if HAS_CE:
        grad += tl.load(ce_shares + token) * tl.exp(below)
    grad = tl.where(logit == -float("inf"), 0.0, grad * slope)
    grad = tl.where(ids < vocab_size, grad, -float("inf"))
    tl.store(row + ids, grad.to(products.dtype.element_ty), mask=ids < width)
