"""Attention over documents that lie one after the other in one row: each token sees its own
document up to itself, and no mask of all pairs of tokens exists.

`by_document` is registered with transformers under the name `stillhouse`. A model that uses it is
called on one row, with the places where documents begin (`cu_seq_lens_q`, as for FlashAttention).
On a GPU it is torch's varlen kernel; elsewhere, and for what that kernel cannot do, one causal call
a document.

Shapes: N tokens of D documents, A query heads, G key heads, E numbers of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
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
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def attend_by_document(model: PreTrainedModel) -> None:
    """Make a model attend by document, where attention alone mixes its tokens and can do so without
    a mask. Another model stays as it is, and makes a mask."""
    before = model.config._attn_implementation
    needs_no_mask = model._supports_flash_attn and model._can_set_attn_implementation()
    if model._is_stateful or not needs_no_mask:
        return
    model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode(), _probing():
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
    is_for_kernel = query_BANE.is_cuda and query_BANE.dtype in _OF_THE_KERNEL
    if cu_seq_lens_q is not None and is_for_kernel and softcap is None and dropout == 0.0:
        back = -1 if sliding_window is None else sliding_window - 1
        found_NAE = varlen_attn(
            query_BANE[0].transpose(0, 1),
            key_BGNE[0].transpose(0, 1),
            value_BGNE[0].transpose(0, 1),
            cu_seq_q=cu_seq_lens_q,
            cu_seq_k=cu_seq_lens_q,
            max_q=max_length_q,
            max_k=max_length_q,
            scale=scale,
            window_size=(back, 0),
            enable_gqa=True,
        )
        assert isinstance(found_NAE, Tensor)
        return found_NAE[None], None

    # one document after the other
    places = [0, query_BANE.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = [
        _attention(
            *(x[:, :, begin:end] for x in (query_BANE, key_BGNE, value_BGNE)),
            scale=scale,
            dropout=dropout,
            window=sliding_window,
            softcap=softcap,
        )
        for begin, end in pairwise(places)
    ]
    found_BANE = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return found_BANE.transpose(1, 2).contiguous(), None


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
    length, groups = query_BALE.shape[2], query_BALE.shape[1] // key_BGLE.shape[1]
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
    key_BALE, value_BALE = (x.repeat_interleave(groups, dim=1) for x in (key_BGLE, value_BGLE))
    scores_BALL = softcap * torch.tanh(query_BALE @ key_BALE.transpose(2, 3) * scale / softcap)
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
