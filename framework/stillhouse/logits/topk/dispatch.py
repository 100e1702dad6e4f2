"""`compress`: the reference's answer by the fastest way there is on this machine, and which way
that is.

Shapes: T tokens, H hidden, V vocabulary, K kept entries, N draws.

Ids never depend on the path; values agree to the rounding of float32, and so do the places of
draws. A path may doubt a row: because it had no room for its ties, or because the row is no
distribution. Those rows, and no others, take the reference's way, which is exact for every row or
says what is wrong with it. So nothing waits for a device before all of its work is queued.
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
from stillhouse.logits.head import Head
from stillhouse.logits.topk import blockmax_cpu, blockmax_torch
from stillhouse.logits.topk.draws import draw_rest
from stillhouse.logits.topk.found import RawTopK, normalise
from stillhouse.logits.topk.reference import checked_seeds, compress_reference

# between these, neither they nor their reciprocals overflow a product with a logit's difference
_GENTLE_TEMPERATURES = (
    1e-30,
    1e30,
)

LogitsOf = Callable[[slice | Tensor], Tensor]
"""The logits of some tokens: a stretch of them, or those of these numbers."""


def backend_for(logits_TV: Tensor, *, k: int, temperature: float = 1.0) -> Backend:
    """The path that `compress` takes with such logits. The first call compiles: in C for a third of
    a second, for a GPU for some.

    Raises what the try of the kernels for a GPU met, where that may pass: nothing is decided by it.
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
        return Backend("native" if compiled.split_rows else "blockmax", compiled.why)
    row_stride = (
        max(logits_TV.stride(0), vocab_size)
        if len(logits_TV) > 1 and logits_TV.stride(1) == 1
        else vocab_size
    )
    return _backend_off_the_cpu(
        device, vocab_size=vocab_size, k=k, dtype=logits_TV.dtype, row_stride=row_stride
    )


@cache  # a search of the path for every block would show
def _backend_off_the_cpu(
    device: torch.device, *, vocab_size: int, k: int, dtype: torch.dtype, row_stride: int
) -> Backend:
    if device.type != "cuda":
        return Backend("blockmax", f"there are no kernels for {device.type}")
    if find_spec("triton") is None:
        return Backend("blockmax", "triton is not installed")
    from stillhouse.logits.topk import blockmax_triton

    if k > blockmax_triton.MOST_ENTRIES:
        return Backend(
            "reference",
            f"k is {k}, and the kernels are for {blockmax_triton.MOST_ENTRIES} entries at most",
        )
    tried = {"vocab_size": vocab_size, "k": k, "dtype": dtype, "row_stride": row_stride}
    why_not = blockmax_triton.too_small(vocab_size, k) or blockmax_triton.defect(device, **tried)
    return (
        Backend("blockmax", why_not)
        if why_not
        else Backend("triton", f"its kernels passed their test on {device}")
    )


@torch.no_grad()
def compress(
    logits_TV: Tensor,
    *,
    k: int,
    tail_draws: int = 0,
    temperature: float = 1.0,
    seeds_T: Tensor | None = None,
) -> CompressedLogits:
    """The target of each row of float16, bfloat16 or float32 logits [T, V], any strides: k exact
    entries and `tail_draws` draws.

    A logit of -inf is a probability of 0. Draws need `seeds_T` (int64, see `token_seeds`), which
    with the logits decide them; where the tail has no mass, and so its draws no weight, they are
    the lowest id that is not kept. Raises ConfigError for an impossible k, number of draws or
    temperature, and TeacherError naming the first token whose logits hold NaN or +inf, or nothing
    above -inf.
    """
    seeds_T = checked_seeds(
        seeds_T,
        logits_TV,
        k=k,
        tail_draws=tail_draws,
        vocab_size=logits_TV.shape[1],
        temperature=temperature,
    )
    return _in_blocks(
        lambda tokens: logits_TV[tokens],
        seeds_T,
        block_tokens=len(logits_TV),
        k=k,
        tail_draws=tail_draws,
        temperature=temperature,
    )


@torch.no_grad()
def compress_hidden(
    hidden_TH: Tensor,
    head: Head,
    *,
    k: int,
    tail_draws: int = 0,
    temperature: float = 1.0,
    seeds_T: Tensor | None = None,
    block_tokens: int = 1024,
    choose_backend: Callable[..., Backend] = backend_for,
) -> CompressedLogits:
    """`compress(head.logits(hidden_TH))`, one block of `block_tokens` tokens at a time: the [T, V]
    logits never exist at once.

    `choose_backend` decides as `backend_for` does. Raises what `compress` does, and ConfigError
    where the hidden states and the head are on different devices.
    """
    if hidden_TH.device != head.weight_VH.device:
        raise ConfigError(
            f"the hidden states are on {hidden_TH.device}, the head's weight on "
            f"{head.weight_VH.device}; move one to the other"
        )
    seeds_T = checked_seeds(
        seeds_T,
        hidden_TH,
        k=k,
        tail_draws=tail_draws,
        vocab_size=head.vocab_size,
        temperature=temperature,
    )
    return _in_blocks(
        lambda tokens: head.logits(hidden_TH[tokens]),
        seeds_T,
        block_tokens=block_tokens,
        k=k,
        tail_draws=tail_draws,
        temperature=temperature,
        choose_backend=choose_backend,
    )


def _in_blocks(
    logits_of: LogitsOf,
    seeds_T: Tensor,
    *,
    block_tokens: int,
    k: int,
    tail_draws: int,
    temperature: float,
    choose_backend: Callable[..., Backend] = backend_for,
) -> CompressedLogits:
    """The targets of all tokens. No more than `block_tokens` rows of logits are asked for at once,
    those in doubt included."""
    numbers_T = torch.arange(len(seeds_T), device=seeds_T.device)
    blocks = [
        slice(start, start + block_tokens)
        for start in range(0, max(1, len(seeds_T)), max(1, block_tokens))
    ]
    parts, doubts = zip(
        *(
            _compress_block(
                logits_of(at),
                seeds_T[at],
                numbers_T[at],
                choose_backend,
                k=k,
                tail_draws=tail_draws,
                temperature=temperature,
            )
            for at in blocks
        ),
        strict=True,
    )
    target, doubtful_T = concatenate(parts), torch.cat(doubts)
    if not doubtful_T.any():
        return target
    rows_T = numbers_T[doubtful_T]
    again = [
        compress_reference(
            logits_of(part_T),
            k=k,
            tail_draws=tail_draws,
            temperature=temperature,
            seeds_T=seeds_T[part_T],
            tokens_T=part_T,
        )
        for part_T in rows_T.split(block_tokens)
    ]
    return target.with_rows(rows_T, concatenate(again))


def _compress_block(
    logits_TV: Tensor,
    seeds_T: Tensor,
    numbers_T: Tensor,
    choose_backend: Callable[..., Backend],
    *,
    k: int,
    tail_draws: int,
    temperature: float,
) -> tuple[CompressedLogits, Tensor]:
    """The target of the tokens of these numbers, and bool [T]: the rows of which it is not certain
    to be right."""
    backend = choose_backend(logits_TV, k=k, temperature=temperature)
    if backend.name == "reference":
        target = compress_reference(
            logits_TV,
            k=k,
            tail_draws=tail_draws,
            temperature=temperature,
            seeds_T=seeds_T,
            tokens_T=numbers_T,
        )
        return target, torch.zeros_like(numbers_T, dtype=torch.bool)
    raw, doubtful_T = _by_backend(backend, logits_TV, k=k, temperature=temperature)
    target, lse_T = normalise(raw, vocab_size=logits_TV.shape[1], temperature=temperature)
    if tail_draws:
        draws_TN = draw_rest(logits_TV, raw, seeds_T, num_draws=tail_draws, temperature=temperature)
        target = replace(target, tail_ids_TN=draws_TN)
    return target, doubtful_T | ~lse_T.isfinite()


def raw_topk(logits_TV: Tensor, *, k: int, temperature: float = 1.0) -> RawTopK:
    """The top-k by the path for these logits, at least one, where that is not the reference. Checks
    nothing."""
    raw, doubtful_T = _by_backend(
        backend_for(logits_TV, k=k), logits_TV, k=k, temperature=temperature
    )
    return (
        blockmax_torch.split(logits_TV, k=k, temperature=temperature) if doubtful_T.any() else raw
    )


def _by_backend(
    backend: Backend, logits_TV: Tensor, *, k: int, temperature: float
) -> tuple[RawTopK, Tensor]:
    """The top-k, and bool [T]: the rows for which the path had no room."""
    if backend.name == "triton":
        from stillhouse.logits.topk import blockmax_triton

        return blockmax_triton.launch(logits_TV, k=k, temperature=temperature)
    split_rows = blockmax_cpu.compiled().split_rows if backend.name == "native" else None
    if split_rows:
        raw = blockmax_cpu.split(split_rows, logits_TV, k=k, temperature=temperature)
    else:
        raw = blockmax_torch.split(logits_TV, k=k, temperature=temperature)
    return raw, torch.zeros(len(logits_TV), dtype=torch.bool, device=logits_TV.device)
