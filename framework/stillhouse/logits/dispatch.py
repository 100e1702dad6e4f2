"""`compress`: the reference's answer by the fastest way there is on this machine, and which way that is.

Shapes: T tokens, H hidden, V vocabulary, K kept entries. Ids never depend on the path; values agree to the rounding of float32.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillhouse.logits import blockmax, native
from stillhouse.logits.compressed import CompressedLogits, concatenate
from stillhouse.logits.head import Head
from stillhouse.logits.rawtopk import RawTopK, normalise
from stillhouse.logits.topk import check_request, compress_reference, refuse_what_is_no_distribution

_GENTLE_TEMPERATURES = (1e-30, 1e30)  # between these, neither they nor their reciprocals overflow a product with a logit's difference


@dataclass(frozen=True, slots=True)
class Path:
    """The way that some logits take to their target, and the reason for it, for people to read."""

    name: Literal["reference", "native", "blockmax"]
    why: str


def path_for(logits_TV: Tensor, *, temperature: float = 1.0) -> Path:
    """The path that `compress` takes with such logits. The first call with logits on the CPU compiles, for a third of a second."""
    least, most = _GENTLE_TEMPERATURES
    if logits_TV.numel() == 0:
        return Path("reference", "there are no logits")
    if not least <= temperature <= most:
        return Path("reference", f"at a temperature of {temperature}, float32 overflows on the way")
    if logits_TV.device.type != "cpu":
        return Path("blockmax", f"plain torch on {logits_TV.device.type}")
    compiled = native.compiled()
    return Path("native" if compiled.split_rows else "blockmax", compiled.why)


@torch.no_grad()
def compress(logits_TV: Tensor, *, k: int, temperature: float = 1.0) -> CompressedLogits:
    """The target of each row of float16, bfloat16 or float32 logits [T, V], any strides, without tail draws.

    A logit of -inf is a probability of 0. Raises ConfigError for an impossible k or temperature, and TeacherError naming the first token
    whose logits hold NaN or +inf, or nothing above -inf.
    """
    return _compress_from(logits_TV, 0, k=k, temperature=temperature)


@torch.no_grad()
def compress_hidden(hidden_TH: Tensor, head: Head, *, k: int, temperature: float = 1.0, block_tokens: int = 1024) -> CompressedLogits:
    """`compress(head.logits(hidden_TH))`, one block of `block_tokens` tokens at a time: the [T, V] logits never exist at once."""
    check_request(k, vocab_size=head.vocab_size, temperature=temperature)
    starts = range(0, max(1, hidden_TH.shape[0]), block_tokens)
    return concatenate(
        [_compress_from(head.logits(hidden_TH[start : start + block_tokens]), start, k=k, temperature=temperature) for start in starts]
    )


def raw_topk(logits_TV: Tensor, *, k: int, temperature: float = 1.0) -> RawTopK:
    """The top-k by the path for these logits, at least one, where that is not the reference. Checks nothing."""
    split_rows = native.compiled().split_rows if path_for(logits_TV).name == "native" else None
    if split_rows:
        return native.split(split_rows, logits_TV, k=k, temperature=temperature)
    return blockmax.split(logits_TV, k=k, temperature=temperature)


def _compress_from(logits_TV: Tensor, first_token: int, *, k: int, temperature: float) -> CompressedLogits:
    """`compress` of rows that are the tokens from `first_token` on."""
    vocab_size = logits_TV.shape[1]
    check_request(k, vocab_size=vocab_size, temperature=temperature)
    if path_for(logits_TV, temperature=temperature).name == "reference":
        return compress_reference(logits_TV, k=k, temperature=temperature, first_token=first_token)
    target, lse_T = normalise(raw_topk(logits_TV, k=k, temperature=temperature), vocab_size=vocab_size, temperature=temperature)
    refuse_what_is_no_distribution(lse_T, logits_TV, first_token, temperature=temperature)
    return target
