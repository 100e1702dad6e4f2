"""Which of the two implementations of the passes over a block of logits a head gets, and why.

A pass is all that is done to a block at full width: one sums it up, one turns it into its gradient.
Both work on products, h W^T + b, and take the scale and the soft-capping of the head in their
stride.
"""

import torch
from torch import Tensor

from stillhouse.logits import Head
from stillhouse.logits.backend import Backend
from stillhouse.losses.head_passes_torch import Passes, TorchPasses

_CPU_TOKENS = 256  # from half to twice as many take the same time
_CPU_LOGITS = 1 << 26
# below 2,048, reading and writing the sum of the weight's gradient shows beside the matrix product
_TOKENS = 4096
_LOGITS = 1 << 30  # 2 GiB of 16 bits each


def backend_for(weight_VH: Tensor) -> Backend:
    """The path of a head with this weight. The first call on a GPU compiles the kernels and tries
    them, for some seconds."""
    device = weight_VH.device
    if device.type != "cuda":
        return Backend("torch", f"the kernels are for CUDA, the head is on {device.type}")
    if weight_VH.dtype == torch.float64:
        return Backend("torch", "the kernels sum in float32, the head is float64")
    try:
        from stillhouse.losses import head_passes_triton
    except ImportError as error:
        return Backend("torch", f"triton cannot be imported: {error}")
    defect = head_passes_triton.defect(device)
    return (
        Backend("torch", defect)
        if defect
        else Backend("triton", f"one kernel a pass on {torch.cuda.get_device_name(device)}")
    )


def passes_for(head: Head, num_tokens: int, *, temperature: float, text: bool) -> Passes:
    """The passes over blocks of up to `num_tokens` tokens; `text` where cross-entropy or the z-loss
    is wanted."""
    if backend_for(head.weight_VH).name == "triton":
        from stillhouse.losses.head_passes_triton import TritonPasses

        return TritonPasses(head, num_tokens, temperature=temperature, text=text)
    return TorchPasses(head, num_tokens, temperature=temperature, text=text)


def block_tokens_for(device: torch.device, vocab_size: int) -> int:
    """How many tokens' logits exist at one time, where nobody says otherwise: decided by the
    device's kind and the vocabulary alone."""
    tokens, logits = (_CPU_TOKENS, _CPU_LOGITS) if device.type == "cpu" else (_TOKENS, _LOGITS)
    return max(1, min(tokens, logits // vocab_size))
