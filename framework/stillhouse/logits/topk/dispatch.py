"""`compress` and `compress_hidden`: targets from logits, by the fastest exact backend there is.

Shapes: T tokens, H hidden, V vocabulary, K kept entries, N draws.

Backends (`backend_for` chooses, and gives the reason):

    native     `blockmax_cpu`     the block-max filter in C, for logits on the CPU
    triton     `blockmax_triton`  the same in Triton, for CUDA, where K and V suit the kernels
    blockmax   `blockmax_torch`   the same in plain torch, for every device
    reference  `reference`        the definition: for temperatures at which float32 overflows, for
                                  K above the kernels' limit, and for rows in doubt

Ids never depend on the backend. Values agree to the rounding of float32, and so do the places of
draws: of the bytes of records, one in some 200,000 is that of the next code. A backend may doubt a
row: it had no room for the row's ties, or the row is no distribution. Doubtful rows, and no others,
are compressed again by the reference, which is exact for every row or raises the error. So no
device is waited for before all of its work is queued.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple, Self

import torch
from torch import Tensor

from stillhouse.errors import ConfigError
from stillhouse.logits.backend import Backend
from stillhouse.logits.compressed import CompressedLogits, concatenate
from stillhouse.logits.head import AS_IT_IS, Curve, Head, products_in_blocks
from stillhouse.logits.spec import TargetSpec
from stillhouse.logits.topk import blockmax_cpu, blockmax_torch
from stillhouse.logits.topk.draws import draw_rest
from stillhouse.logits.topk.found import (
    RawTopK,
    entropy_of_rest,
    logprobs_at,
    normalise,
)
from stillhouse.logits.topk.reference import checked_labels, checked_seeds, compress_reference
from stillhouse.logits.topk.streams import NUM_BUFFERS, Streams, in_turn

# Between these, neither a temperature nor its reciprocal overflows a product with a difference of
# logits.
_GENTLE_TEMPERATURES = (1e-30, 1e30)

LogitsOf = Callable[[slice | Tensor], Tensor]
"""The logits of some rows: a slice of them, or the rows of these numbers (int64)."""


@torch.no_grad()
def compress(
    logits_TV: Tensor,
    spec: TargetSpec,
    *,
    seeds_T: Tensor | None = None,
    labels_T: Tensor | None = None,
) -> CompressedLogits:
    """Compress logits to targets: for each row, K exact entries, the tail's mass and N draws.

    logits_TV: float16, bfloat16 or float32, on any device, of any strides; a logit of -inf is a
    probability of 0. seeds_T: int64 [T], from `token_seeds`, needed for draws; logits and seeds
    alone decide them. Where the tail has no mass, draws are the lowest id that is not kept.
    labels_T: int64 [T], the ids of the tokens that really follow, for a spec with label_logprob.

    Raises ConfigError for logits of another vocabulary, and for seeds or labels that are missing or
    of no use, and TeacherError naming the first token whose logits hold NaN or +inf, or nothing
    above -inf.

        spec = TargetSpec(vocab_size=logits_TV.shape[1], k=64)
        compressed = compress(logits_TV, spec)
    """
    return compress_in_blocks(
        lambda rows: logits_TV[rows],
        spec,
        Tokens.of(
            checked_seeds(seeds_T, logits_TV, spec=spec, vocab_size=logits_TV.shape[1]),
            checked_labels(labels_T, logits_TV, spec=spec),
        ),
        block_tokens=len(logits_TV),
    )


@torch.no_grad()
def compress_hidden(
    hidden_TH: Tensor,
    head: Head,
    *,
    spec: TargetSpec,
    seeds_T: Tensor | None = None,
    labels_T: Tensor | None = None,
    block_tokens: int = 1024,
    overlap: bool = False,
) -> CompressedLogits:
    """`compress(head.logits(hidden_TH), spec)` in blocks, so that [T, V] logits never exist.

    hidden_TH: a model's last hidden states, on the head's device. No more than `block_tokens` rows
    of logits exist at once. overlap: read a block while a GPU multiplies the next one, with twice
    the rows of logits; the targets are the same. A GPU applies the head's scale and soft-cap in
    float32, whatever the dtype of its products. Raises what `compress` does, and ConfigError for
    hidden states and a head on different devices.

        compressed = compress_hidden(hidden_TH, head, spec=TargetSpec(head.vocab_size, k=64))
        records_TB = encode(compressed, spec)
    """
    if hidden_TH.device != head.weight_VH.device:
        raise ConfigError(
            f"the hidden states are on {hidden_TH.device}, the head's weight on "
            f"{head.weight_VH.device}; move one to the other"
        )
    tokens = Tokens.of(
        checked_seeds(seeds_T, hidden_TH, spec=spec, vocab_size=head.vocab_size),
        checked_labels(labels_T, hidden_TH, spec=spec),
    )

    # in blocks
    streams = Streams.of(hidden_TH.device) if overlap else None
    products_of, curve = products_in_blocks(
        head, hidden_TH, block_tokens=block_tokens, num_buffers=NUM_BUFFERS if streams else 1
    )
    return compress_in_blocks(
        products_of, spec, tokens, block_tokens=block_tokens, curve=curve, streams=streams
    )


def backend_for(logits_TV: Tensor, *, k: int, temperature: float = 1.0) -> Backend:
    """The backend that `compress` takes for such logits, and the reason.

    The first call compiles: in C for about a second, for a GPU for some seconds. Raises a
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


class Tokens(NamedTuple):
    """What is known of each token beside its logits, int64 [T]."""

    numbers_T: Tensor  # from 0, for errors
    seeds_T: Tensor
    labels_T: Tensor  # zeros where the target keeps no label

    @classmethod
    def of(cls, seeds_T: Tensor, labels_T: Tensor) -> Self:
        return cls(torch.arange(len(seeds_T), device=seeds_T.device), seeds_T, labels_T)

    def at(self, rows: slice | Tensor) -> Self:
        """Those of some rows."""
        return type(self)(*(tensor[rows] for tensor in self))


def compress_in_blocks(
    logits_of: LogitsOf,
    spec: TargetSpec,
    tokens: Tokens,
    *,
    block_tokens: int,
    curve: Curve = AS_IT_IS,
    choose_backend: Callable[..., Backend] = backend_for,
    streams: Streams | None = None,
) -> CompressedLogits:
    """Targets of all rows, `block_tokens` rows of logits at a time; checks nothing of `spec`.

    `logits_of` may give products, of which `curve` makes the logits; the rows of one call are done
    with before the next, or, with `streams`, before the next but one. `choose_backend` is called as
    `backend_for` is, once a block.
    """
    # every block by its backend
    num_tokens = len(tokens.numbers_T)
    blocks = [
        slice(start, start + block_tokens)
        for start in range(0, max(1, num_tokens), max(1, block_tokens))
    ]

    def read(at: slice, products_TV: Tensor) -> tuple[CompressedLogits, Tensor]:
        return _compress_block(products_TV, curve, spec, tokens.at(at), choose_backend)

    parts, doubts = zip(*in_turn(blocks, logits_of, read, streams=streams), strict=True)
    target, doubtful_T = concatenate(parts), torch.cat(doubts)

    # the rows in doubt again, by the reference; the first line waits until the parts are read, for
    # another stream may reuse their memory once they are dropped
    if not doubtful_T.any():
        return target
    rows_T = tokens.numbers_T[doubtful_T]
    again = [
        _by_reference(curve.float32_logits(logits_of(part_T)), spec, tokens.at(part_T))
        for part_T in rows_T.split(block_tokens)
    ]
    return target.with_rows(rows_T, concatenate(again))


def _by_reference(logits_TV: Tensor, spec: TargetSpec, tokens: Tokens) -> CompressedLogits:
    return compress_reference(
        logits_TV,
        spec,
        seeds_T=tokens.seeds_T,
        labels_T=tokens.labels_T if spec.label_logprob else None,
        tokens_T=tokens.numbers_T,
    )


def _compress_block(
    products_TV: Tensor,
    curve: Curve,
    spec: TargetSpec,
    tokens: Tokens,
    choose_backend: Callable[..., Backend],
) -> tuple[CompressedLogits, Tensor]:
    """Targets of the rows of these tokens, and bool [T]: the rows in doubt."""
    # all at once, where kernels or C make such a target whole
    k, temperature = spec.k, spec.temperature
    backend = choose_backend(products_TV, k=k, temperature=temperature)
    if backend.name == "triton":
        from stillhouse.logits.topk import blockmax_triton

        return blockmax_triton.compress_block(
            products_TV, curve, spec, seeds_T=tokens.seeds_T, labels_T=tokens.labels_T
        )
    logits_TV = curve.float32_logits(products_TV)
    if backend.name == "reference":
        target = _by_reference(logits_TV, spec, tokens)
        return target, torch.zeros_like(tokens.numbers_T, dtype=torch.bool)
    make_targets = blockmax_cpu.compiled().make_targets if backend.name == "native" else None
    if make_targets and blockmax_cpu.suits(spec):
        target, lse_T = blockmax_cpu.targets(
            make_targets, logits_TV, spec=spec, seeds_T=tokens.seeds_T, labels_T=tokens.labels_T
        )
        return target, ~lse_T.isfinite()

    # the top-k, the tail's mass, and draws from the tail
    raw, doubtful_T = _raw_topk_by(backend, logits_TV, k=k, temperature=temperature)
    target, lse_T = normalise(raw, vocab_size=spec.vocab_size, temperature=temperature)
    if spec.num_draws:
        draws_TN = draw_rest(
            logits_TV,
            raw,
            tokens.seeds_T,
            num_draws=spec.num_draws,
            temperature=temperature,
            weighted=spec.weighted,
        )
        target = replace(target, tail_ids_TN=draws_TN)

    # what else the target holds
    if spec.weighted:
        logprobs_TN = logprobs_at(
            logits_TV, target.tail_ids_TN, lse_T=lse_T, temperature=temperature
        )
        target = replace(target, draw_logprobs_TN=logprobs_TN)
    if spec.label_logprob:
        label_T1 = logprobs_at(
            logits_TV, tokens.labels_T[:, None], lse_T=lse_T, temperature=temperature
        )
        target = replace(target, label_logprob_T=label_T1[:, 0])
    if spec.tail_entropy:
        entropy_T = entropy_of_rest(logits_TV, raw.token_ids_TK, temperature=temperature)
        target = replace(target, tail_entropy_T=entropy_T)
    return target, doubtful_T | lse_T.isnan()


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
