"""`compress` and `compress_hidden`: targets from logits, by the fastest exact backend there is.

Shapes: T tokens, H hidden, V vocabulary, K kept entries, N draws.

Backends (`backend_for` chooses, and gives the reason):

    native     `blockmax_cpu`     the block-max filter in C, for logits on the CPU
    triton     `blockmax_triton`  the same in Triton, for CUDA, where K and V suit the kernels
    blockmax   `blockmax_torch`   the same in plain torch, for every device
    reference  `reference`        the definition: for temperatures at which float32 overflows, for
                                  K above the kernels' limit, and for rows in doubt

Ids never depend on the backend. Values agree to the rounding of float32, and so do the places of
draws. A backend may doubt a row: it had no room for the row's ties, or the row is no distribution.
Doubtful rows, and no others, are compressed again by the reference, which is exact for every row or
raises the error. So no device is waited for before all of its work is queued.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from stillhouse.errors import ConfigError
from stillhouse.logits.backend import Backend
from stillhouse.logits.compressed import CompressedLogits, concatenate
from stillhouse.logits.head import AS_IT_IS, Curve, Head, products_in_blocks
from stillhouse.logits.spec import TargetSpec
from stillhouse.logits.topk import blockmax_cpu, blockmax_torch
from stillhouse.logits.topk.draws import draw_rest
from stillhouse.logits.topk.found import RawTopK, normalise
from stillhouse.logits.topk.reference import checked_seeds, compress_reference

# Between these, neither a temperature nor its reciprocal overflows a product with a difference of
# logits.
_GENTLE_TEMPERATURES = (1e-30, 1e30)

LogitsOf = Callable[[slice | Tensor], Tensor]
"""The logits of some rows: a slice of them, or the rows of these numbers (int64)."""


@torch.no_grad()
def compress(
    logits_TV: Tensor, spec: TargetSpec, *, seeds_T: Tensor | None = None
) -> CompressedLogits:
    """Compress logits to targets: for each row, K exact entries, the tail's mass and N draws.

    logits_TV: float16, bfloat16 or float32, on any device, of any strides; a logit of -inf is a
    probability of 0. seeds_T: int64 [T], from `token_seeds`, needed for draws; logits and seeds
    alone decide them. Where the tail has no mass, draws are the lowest id that is not kept.

    Raises ConfigError for logits of another vocabulary or missing seeds, and TeacherError naming
    the first token whose logits hold NaN or +inf, or nothing above -inf.

        spec = TargetSpec(vocab_size=logits_TV.shape[1], k=64)
        compressed = compress(logits_TV, spec)
    """
    seeds_T = checked_seeds(seeds_T, logits_TV, spec=spec, vocab_size=logits_TV.shape[1])
    return compress_in_blocks(
        lambda rows: logits_TV[rows], spec, seeds_T=seeds_T, block_tokens=len(logits_TV)
    )


@torch.no_grad()
def compress_hidden(
    hidden_TH: Tensor,
    head: Head,
    *,
    spec: TargetSpec,
    seeds_T: Tensor | None = None,
    block_tokens: int = 1024,
) -> CompressedLogits:
    """`compress(head.logits(hidden_TH), spec)` in blocks, so that [T, V] logits never exist.

    hidden_TH: a model's last hidden states, on the head's device. No more than `block_tokens` rows
    of logits exist at once. Raises what `compress` does, and ConfigError for hidden states and a
    head on different devices.

        compressed = compress_hidden(hidden_TH, head, spec=TargetSpec(head.vocab_size, k=64))
        records_TB = encode(compressed, spec)
    """
    if hidden_TH.device != head.weight_VH.device:
        raise ConfigError(
            f"the hidden states are on {hidden_TH.device}, the head's weight on "
            f"{head.weight_VH.device}; move one to the other"
        )
    seeds_T = checked_seeds(seeds_T, hidden_TH, spec=spec, vocab_size=head.vocab_size)
    products_of, curve = products_in_blocks(head, hidden_TH, block_tokens=block_tokens)
    return compress_in_blocks(
        products_of, spec, seeds_T=seeds_T, block_tokens=block_tokens, curve=curve
    )


def backend_for(logits_TV: Tensor, *, k: int, temperature: float = 1.0) -> Backend:
    """The backend that `compress` takes for such logits, and the reason.

    The first call compiles: in C for a third of a second, for a GPU for some seconds. Raises a
    failure of the GPU kernels' self-test that may pass, such as too little memory; the next call
    tries again.
    """
    least, most = _GENTLE_TEMPERATURES
    vocab_size, device = logits_TV.shape[1], logits_TV.device
    if logits_TV.numel() == 0:
        return Backend("reference", "there are no logits")
    if not least <= temperature <= most:
        return Backend(
            "reference", f"at a temperature of {temperature}, float32 overflows on the way"
        )
    if device.type == "cpu":
        compiled = blockmax_cpu.compiled()
        return Backend("native" if compiled.split_rows else "blockmax", compiled.reason)
    in_place = len(logits_TV) > 1 and logits_TV.stride(1) == 1
    row_stride = max(logits_TV.stride(0), vocab_size) if in_place else vocab_size
    return _accelerator_backend(
        device, vocab_size=vocab_size, k=k, dtype=logits_TV.dtype, row_stride=row_stride
    )


@cache  # looking for triton at every block would show
def _accelerator_backend(
    device: torch.device, *, vocab_size: int, k: int, dtype: torch.dtype, row_stride: int
) -> Backend:
    """`backend_for` off the CPU: triton where its kernels suit K and V and pass their self-test."""
    if device.type != "cuda":
        return Backend("blockmax", f"there are no kernels for {device.type}")
    if find_spec("triton") is None:
        return Backend("blockmax", "triton is not installed")
    from stillhouse.logits.topk import blockmax_triton

    most = blockmax_triton.MOST_ENTRIES
    if k > most:
        return Backend("reference", f"k is {k}, and the kernels are for {most} entries at most")
    why_not = blockmax_triton.too_small(vocab_size, k) or blockmax_triton.self_test_failure(
        device, vocab_size=vocab_size, k=k, dtype=dtype, row_stride=row_stride
    )
    if why_not:
        return Backend("blockmax", why_not)
    return Backend("triton", f"its kernels passed their test on {device}")


def compress_in_blocks(
    logits_of: LogitsOf,
    spec: TargetSpec,
    *,
    seeds_T: Tensor,
    block_tokens: int,
    curve: Curve = AS_IT_IS,
    choose_backend: Callable[..., Backend] = backend_for,
) -> CompressedLogits:
    """Targets of all rows, `block_tokens` rows of logits at a time; checks nothing of `spec`.

    `logits_of` may give products, of which `curve` makes the logits; the rows of one call are done
    with before the next. `choose_backend` is called as `backend_for` is, once a block.
    """
    # every block by its backend
    numbers_T = torch.arange(len(seeds_T), device=seeds_T.device)
    blocks = [
        slice(start, start + block_tokens)
        for start in range(0, max(1, len(seeds_T)), max(1, block_tokens))
    ]
    parts, doubts = zip(
        *(
            _compress_block(logits_of(at), curve, spec, seeds_T[at], numbers_T[at], choose_backend)
            for at in blocks
        ),
        strict=True,
    )
    target, doubtful_T = concatenate(parts), torch.cat(doubts)

    # the rows in doubt again, by the reference
    if not doubtful_T.any():
        return target
    rows_T = numbers_T[doubtful_T]
    again = [
        compress_reference(
            curve.logits(logits_of(part_T)), spec, seeds_T=seeds_T[part_T], tokens_T=part_T
        )
        for part_T in rows_T.split(block_tokens)
    ]
    return target.with_rows(rows_T, concatenate(again))


def _compress_block(
    products_TV: Tensor,
    curve: Curve,
    spec: TargetSpec,
    seeds_T: Tensor,
    numbers_T: Tensor,
    choose_backend: Callable[..., Backend],
) -> tuple[CompressedLogits, Tensor]:
    """Targets of the rows of these numbers, and bool [T]: the rows in doubt."""
    # a backend that makes the whole target
    k, temperature = spec.k, spec.temperature
    backend = choose_backend(products_TV, k=k, temperature=temperature)
    has_more = spec.weighted or spec.label_logprob or spec.tail_entropy
    if backend.name == "triton" and not has_more:
        from stillhouse.logits.topk import blockmax_triton

        return blockmax_triton.compress_block(products_TV, curve, spec, seeds_T=seeds_T)
    logits_TV = curve.logits(products_TV)
    if backend.name == "reference":
        target = compress_reference(logits_TV, spec, seeds_T=seeds_T, tokens_T=numbers_T)
        return target, torch.zeros_like(numbers_T, dtype=torch.bool)

    # the top-k by another, then the target from it
    raw, doubtful_T = _raw_topk_by(backend, logits_TV, k=k, temperature=temperature)
    target, lse_T = normalise(raw, vocab_size=spec.vocab_size, temperature=temperature)
    if spec.num_draws:
        draws_TN = draw_rest(
            logits_TV, raw, seeds_T, num_draws=spec.num_draws, temperature=temperature
        )
        target = replace(target, tail_ids_TN=draws_TN)
    return target, doubtful_T | ~lse_T.isfinite()


def raw_topk(logits_TV: Tensor, *, k: int, temperature: float = 1.0) -> RawTopK:
    """The top-k of at least one logit by a block-max backend, never the reference. Checks
    nothing."""
    backend = backend_for(logits_TV, k=k)
    raw, doubtful_T = _raw_topk_by(backend, logits_TV, k=k, temperature=temperature)
    if doubtful_T.any():
        return blockmax_torch.split(logits_TV, k=k, temperature=temperature)
    return raw


def _raw_topk_by(
    backend: Backend, logits_TV: Tensor, *, k: int, temperature: float
) -> tuple[RawTopK, Tensor]:
    """The top-k, and bool [T]: the rows for whose ties the backend had no room."""
    if backend.name == "triton":
        from stillhouse.logits.topk import blockmax_triton

        return blockmax_triton.launch(logits_TV, k=k, temperature=temperature)
    split_rows = blockmax_cpu.compiled().split_rows if backend.name == "native" else None
    if split_rows:
        raw = blockmax_cpu.split(split_rows, logits_TV, k=k, temperature=temperature)
    else:
        raw = blockmax_torch.split(logits_TV, k=k, temperature=temperature)
    return raw, torch.zeros(len(logits_TV), dtype=torch.bool, device=logits_TV.device)
