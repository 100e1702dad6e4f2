"""Attention over documents that lie one after the other in one row: each token sees its own
document up to itself, and no mask of all pairs of tokens exists.

`by_document` is registered with transformers under the name `stillhouse`. A model that uses it is
called on one row, with the places where documents begin (`cu_seq_lens_q`, as for FlashAttention).
On a GPU it is torch's varlen kernel; elsewhere, and for what that kernel cannot do, one causal call
a document.

Shapes: N tokens of D documents, A query heads, G key heads, E numbers of a head.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import dropout as dropped
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from stillhouse.models import _transformers_compat

_log = logging.getLogger(__name__)

NAME = "stillhouse"
_OF_THE_KERNEL = (torch.float16, torch.bfloat16)
_is_probe: ContextVar[bool] = ContextVar("is_probe", default=False)


@dataclass(frozen=True, slots=True)
class Documents:
    """Where documents lie in one row of N tokens."""

    places_D1: Tensor  # int32: where each begins, and N
    longest: int  # tokens

    @classmethod
    def of(cls, lengths: NDArray[np.int64]) -> Self:
        places = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        return cls(torch.from_numpy(places), int(lengths.max()))

    @property
    def arguments(self) -> dict[str, Any]:
        """For a model that attends by document; the names are those of FlashAttention's users."""
        return {
            "cu_seq_lens_q": self.places_D1,
            "cu_seq_lens_k": self.places_D1,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, places_D1=change(self.places_D1))


def attends_by_document(model: PreTrainedModel) -> bool:
    return _transformers_compat.attention_of(model) == NAME


def attend_by_document(model: PreTrainedModel) -> None:
    """Make a model attend by document, where attention alone mixes its tokens and can do so without
    a mask. Another model stays as it is, and makes a mask."""
    before = _transformers_compat.attention_of(model)
    if not _transformers_compat.attends_without_mask(model):
        return
    model.set_attn_implementation(NAME)
    try:
        with torch.no_grad(), _probing():
            _call_on_two_documents(model)
    except Exception:  # of any architecture, which may not take these arguments
        model.set_attn_implementation(before)


def by_document(
    module: nn.Module,
    query_BANE: Tensor,
    key_BGNE: Tensor,
    value_BGNE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """[B, N, A, E]: the attention within each document, of B = 1 row. `cu_seq_lens_q`: int32
    [D + 1], the places where documents begin, and N; `max_length_q` is the longest one.

    Without them each of the B rows is one document. `sliding_window`: of how many tokens a token
    sees, itself included.
    """
    if _is_probe.get() and (cu_seq_lens_q is None or not _is_plain(module, others)):
        raise NotImplementedError("these layers need more than documents")
    assert attention_mask is None, "documents leave no place for a mask"
    scale = query_BANE.shape[-1] ** -0.5 if scaling is None else scaling

    # by the kernel
    is_for_kernel = cu_seq_lens_q is not None and softcap is None and dropout == 0.0
    if is_for_kernel and query_BANE.is_cuda and query_BANE.dtype in _OF_THE_KERNEL:
        assert cu_seq_lens_q is not None
        _, num_heads, _, size = query_BANE.shape
        heads, has_window = (num_heads, key_BGNE.shape[1]), sliding_window is not None
        if kernel_is_right(query_BANE.device, query_BANE.dtype, heads, size, has_window):
            found_NAE = _by_kernel(
                query_BANE[0].transpose(0, 1),
                key_BGNE[0].transpose(0, 1),
                value_BGNE[0].transpose(0, 1),
                documents=Documents(cu_seq_lens_q, max_length_q),
                scale=scale,
                window=sliding_window,
            )
            return found_NAE[None], None

    # one document after the other
    places = [0, query_BANE.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    found_BNAE = _one_by_one(
        query_BANE.transpose(1, 2),
        key_BGNE.transpose(1, 2),
        value_BGNE.transpose(1, 2),
        places=places,
        scale=scale,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
    )
    return found_BNAE.contiguous(), None


def _one_by_one(
    query_BNAE: Tensor,
    key_BNGE: Tensor,
    value_BNGE: Tensor,
    *,
    places: Sequence[int],
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[B, N, A, E], or [N, A, E] of one row."""
    parts = [
        _attention(
            query_BNAE[..., begin:end, :, :].transpose(-3, -2),
            key_BNGE[..., begin:end, :, :].transpose(-3, -2),
            value_BNGE[..., begin:end, :, :].transpose(-3, -2),
            scale=scale,
            dropout=dropout,
            window=window,
            softcap=softcap,
        ).transpose(-3, -2)
        for begin, end in pairwise(places)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-3)


def _by_kernel(
    query_NAE: Tensor,
    key_NGE: Tensor,
    value_NGE: Tensor,
    *,
    documents: Documents,
    scale: float,
    window: int | None,
) -> Tensor:
    """[N, A, E], by FlashAttention."""
    found_NAE = varlen_attn(
        query_NAE,
        key_NGE,
        value_NGE,
        documents.places_D1,
        documents.places_D1,
        documents.longest,
        documents.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(found_NAE, Tensor)
    return found_NAE


@cache
def kernel_is_right(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: tuple[int, int],
    size: int,
    has_window: bool,
) -> bool:
    """Whether the kernel has the values and gradients of one call a document, on two documents of
    heads like these. A kernel that fails or differs is not used, and the log says so."""
    # the heads of 5 and 3 tokens
    generator = torch.Generator().manual_seed(0)
    query_NAE, key_NGE, value_NGE = (
        torch.randn(8, heads, size, generator=generator).to(device, dtype)
        for heads in (*num_heads, num_heads[1])
    )
    documents = Documents.of(np.array([5, 3])).map(lambda places_D1: places_D1.to(device))
    window = 2 if has_window else None

    def with_gradients(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [x.clone().requires_grad_() for x in (query_NAE, key_NGE, value_NGE)]
            found_NAE = way(inputs[0], inputs[1], inputs[2])
            loss = found_NAE.float().square().sum()
            return [found_NAE, *torch.autograd.grad(loss, inputs, allow_unused=True)]

    # both ways
    wanted = with_gradients(partial(_one_by_one, places=[0, 5, 8], scale=0.3, window=window))
    try:
        found = with_gradients(partial(_by_kernel, documents=documents, scale=0.3, window=window))
        is_right = all(
            ours is not None and torch.allclose(ours.float(), theirs.float(), rtol=0.05, atol=0.05)
            for ours, theirs in zip(found, wanted, strict=True)
        )
        why = "it differs"
    except Exception as failure:  # of a driver or a device: there is another way
        is_right, why = False, str(failure)
    if not is_right:
        _log.warning("torch's varlen attention is not used on %s: %s", device, why)
    return is_right


def _attention(
    query_BALE: Tensor,
    key_BGLE: Tensor,
    value_BGLE: Tensor,
    *,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[B, A, L, E]: causal attention within one document of L tokens."""
    length, groups = query_BALE.shape[-2], query_BALE.shape[-3] // key_BGLE.shape[-3]
    seen_LL = None
    if window is not None and window < length:
        seen_LL = torch.ones(length, length, dtype=torch.bool, device=query_BALE.device).tril()
        seen_LL = seen_LL.triu(1 - window)
    if softcap is None:
        return scaled_dot_product_attention(
            query_BALE,
            key_BGLE,
            value_BGLE,
            attn_mask=seen_LL,
            dropout_p=dropout,
            is_causal=seen_LL is None,
            scale=scale,
            enable_gqa=groups > 1,
        )

    # no kernel of torch's has a soft cap
    if seen_LL is None:
        seen_LL = torch.ones(length, length, dtype=torch.bool, device=query_BALE.device).tril()
    key_BALE, value_BALE = (x.repeat_interleave(groups, dim=-3) for x in (key_BGLE, value_BGLE))
    scores_BALL = softcap * torch.tanh(query_BALE @ key_BALE.transpose(-2, -1) * scale / softcap)
    scores_BALL = scores_BALL.masked_fill(~seen_LL, float("-inf"))
    shares_BALL = scores_BALL.softmax(dim=-1, dtype=torch.float32).to(query_BALE.dtype)
    return dropped(shares_BALL, dropout) @ value_BALE


def _is_plain(module: nn.Module, others: dict[str, Any]) -> bool:
    """Whether attention is causal, with nothing that `by_document` does not know: no sinks, no
    biases of positions."""
    is_causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return False
    return others.get("s_aux") is None and others.get("position_bias") is None


@contextmanager
def _probing() -> Iterator[None]:
    token = _is_probe.set(True)
    try:
        yield
    finally:
        _is_probe.reset(token)


def _call_on_two_documents(model: PreTrainedModel) -> None:
    device = next(model.get_input_embeddings().parameters()).device
    positions_1N = torch.tensor([[0, 1, 0, 1]], device=device)
    documents = Documents.of(np.array([2, 2]))
    model.base_model(
        input_ids=torch.zeros_like(positions_1N),
        position_ids=positions_1N,
        use_cache=False,
        **documents.map(lambda places: places.to(device)).arguments,
    )


AttentionInterface.register(NAME, by_document)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
