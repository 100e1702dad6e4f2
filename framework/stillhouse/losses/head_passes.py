"""The two passes over a block of logits, all that is done to them at full width: one sums them up, one turns them into their gradient.

Both work on products, h W^T + b, and take the scale and the soft-capping of the head in their stride. `TorchPasses` is the reference and
the way of the CPU; `head_passes_triton` has the same two passes as one kernel each.

Shapes: C tokens of one block, K kept entries, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from stillhouse.logits import Head

_CPU_TOKENS = 256  # from half to twice as many take the same time
_CPU_LOGITS = 1 << 26
_TOKENS = 4096  # below 2,048, reading and writing the sum of the weight's gradient shows beside the matrix product
_LOGITS = 1 << 30  # 2 GiB of 16 bits each


class Tail(NamedTuple):
    """What the logits outside the kept ids come to."""

    peak_C1: Tensor  # the greatest of them, before temperature; finite even where every id is kept
    sum_C1: Tensor  # of exp((logit - peak) / temperature)
    text_sum_C1: Tensor  # of exp(logit - peak); the same tensor at temperature 1, or where nobody asks for it


class Shares(NamedTuple):
    """The gradient in a logit of the tail: share * exp((logit - peak) / temperature) + text_share * exp(logit - peak)."""

    peak_C1: Tensor
    share_C1: Tensor
    text_share_C1: Tensor  # without effect where the text is not asked for, or the temperature is 1


class Passes(Protocol):
    """Both passes over one block after another, each of at most as many tokens as there is room for."""

    products_CV: Tensor  # room for the products, in the weight's dtype

    def read_(self, products_CV: Tensor, ids_CK: Tensor) -> Tail:
        """Sum up the tail. The products are lost, or marked for `write_`."""

    def write_(self, products_CV: Tensor, shares: Shares) -> Tensor:
        """[C, V] gradient of the tail in the products, in the place of the products or of a buffer; anything at the kept ids."""


@dataclass(frozen=True, slots=True)
class Path:
    """How the passes are done, and why, for people to read."""

    name: Literal["torch", "triton"]
    why: str


def path_for(weight_VH: Tensor) -> Path:
    """The path of a head with this weight. The first call on a GPU compiles the kernels and tries them, for some seconds."""
    device = weight_VH.device
    if device.type != "cuda":
        return Path("torch", f"the kernels are for CUDA, the head is on {device.type}")
    if weight_VH.dtype == torch.float64:
        return Path("torch", "the kernels sum in float32, the head is float64")
    try:
        from stillhouse.losses import head_passes_triton
    except ImportError as error:
        return Path("torch", f"triton cannot be imported: {error}")
    defect = head_passes_triton.defect(device)
    return Path("torch", defect) if defect else Path("triton", f"one kernel a pass on {torch.cuda.get_device_name(device)}")


def passes_for(head: Head, num_tokens: int, *, temperature: float, text: bool) -> Passes:
    """The passes over blocks of up to `num_tokens` tokens; `text` where cross-entropy or the z-loss is wanted."""
    if path_for(head.weight_VH).name == "triton":
        from stillhouse.losses.head_passes_triton import TritonPasses

        return TritonPasses(head, num_tokens, temperature=temperature, text=text)
    return TorchPasses(head, num_tokens, temperature=temperature, text=text)


def block_tokens_for(device: torch.device, vocab_size: int) -> int:
    """How many tokens' logits exist at one time, where nobody says otherwise: decided by the device's kind and the vocabulary alone."""
    tokens, logits = (_CPU_TOKENS, _CPU_LOGITS) if device.type == "cpu" else (_TOKENS, _LOGITS)
    return max(1, min(tokens, logits // vocab_size))


def capped(head: Head, products_CX: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a few products, and d logit / d product at each."""
    logits_CX = products_CX * head.scale
    if head.softcap is None:
        return logits_CX, torch.full_like(logits_CX, head.scale)
    bent_CX = torch.tanh(logits_CX / head.softcap)
    return bent_CX * head.softcap, (1.0 - bent_CX.square()) * head.scale


class TorchPasses:
    """In torch's own operations, in float32 (float64 where the weight is). Its buffers live as long as it does, and serve every block."""

    def __init__(self, head: Head, num_tokens: int, *, temperature: float, text: bool):
        weight_VH = head.weight_VH
        dtype = torch.promote_types(weight_VH.dtype, torch.float32)

        def buffer(wanted: bool) -> Tensor | None:
            return weight_VH.new_empty((num_tokens, head.vocab_size), dtype=dtype) if wanted else None

        self.products_CV = weight_VH.new_empty((num_tokens, head.vocab_size))
        self._head, self._temperature = head, temperature
        self._wide_CV = buffer(weight_VH.dtype != dtype)
        self._slope_CV = buffer(head.softcap is not None)
        self._text_CV = buffer(text and temperature != 1.0)

    def read_(self, products_CV: Tensor, ids_CK: Tensor) -> Tail:
        num_tokens = products_CV.shape[0]
        masses_CV = products_CV if self._wide_CV is None else self._wide_CV[:num_tokens].copy_(products_CV)
        if self._head.scale != 1.0:
            masses_CV.mul_(self._head.scale)
        if self._head.softcap is not None and self._slope_CV is not None:
            masses_CV.div_(self._head.softcap).tanh_()
            torch.mul(masses_CV, masses_CV, out=self._slope_CV[:num_tokens]).neg_().add_(1.0)
            masses_CV.mul_(self._head.softcap)
        masses_CV.scatter_(1, ids_CK, torch.finfo(masses_CV.dtype).min)  # not -inf, which would make NaN of an empty tail
        peak_C1 = masses_CV.amax(dim=1, keepdim=True)
        masses_CV.sub_(peak_C1)
        text_sum_C1 = None
        if self._text_CV is not None:
            text_sum_C1 = torch.exp(masses_CV, out=self._text_CV[:num_tokens]).sum(dim=1, keepdim=True)
        if self._temperature != 1.0:
            masses_CV.div_(self._temperature)
        sum_C1 = masses_CV.exp_().sum(dim=1, keepdim=True)
        return Tail(peak_C1, sum_C1, sum_C1 if text_sum_C1 is None else text_sum_C1)

    def write_(self, products_CV: Tensor, shares: Shares) -> Tensor:
        num_tokens = products_CV.shape[0]
        gradient_CV = products_CV if self._wide_CV is None else self._wide_CV[:num_tokens]
        gradient_CV.mul_(shares.share_C1 * self._head.scale)
        if self._text_CV is not None:
            gradient_CV.addcmul_(self._text_CV[:num_tokens], shares.text_share_C1 * self._head.scale)
        return gradient_CV if self._slope_CV is None else gradient_CV.mul_(self._slope_CV[:num_tokens])
