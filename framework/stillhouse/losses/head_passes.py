"""Which implementation of the passes over a block of logits a head gets (its backend), and how many
tokens a block has.

The passes themselves: `head_passes_torch`, the reference, and `head_passes_triton`, the kernels.
"""

import torch
from torch import Tensor

from stillhouse.logits import Head
from stillhouse.logits.backend import Backend
from stillhouse.losses.head_passes_torch import Passes, TorchPasses

_CPU_BLOCK_TOKENS = 256  # from half to twice as many take the same time
_CPU_BLOCK_LOGITS = 1 << 26
# below 2,048, reading and writing the sum of the weight's gradient shows beside the matmul
_GPU_BLOCK_TOKENS = 4096
_GPU_BLOCK_LOGITS = 1 << 30  # 2 GiB of 16 bits each


def backend_for(weight_VH: Tensor) -> Backend:
    """The backend of a head with this weight. The first call on a GPU compiles the kernels and
    tests them, which takes seconds."""
    device = weight_VH.device
    if device.type != "cuda":
        return Backend("torch", f"the kernels are for CUDA, the head is on {device.type}")
    if weight_VH.dtype == torch.float64:
        return Backend("torch", "the kernels sum in float32, the head is float64")
    try:
        from stillhouse.losses import head_passes_triton
    except ImportError as error:
        return Backend("torch", f"triton cannot be imported: {error}")
    if failure := head_passes_triton.self_test_failure(device):
        return Backend("torch", failure)
    return Backend("triton", f"one kernel a pass on {torch.cuda.get_device_name(device)}")


def passes_for(head: Head, num_tokens: int, *, temperature: float, label_loss: bool) -> Passes:
    """The passes over blocks of up to `num_tokens` tokens, on the head's backend. Arguments: see
    `Passes`."""
    if backend_for(head.weight_VH).name == "triton":
        from stillhouse.losses.head_passes_triton import TritonPasses

        return TritonPasses(head, num_tokens, temperature=temperature, label_loss=label_loss)
    return TorchPasses(head, num_tokens, temperature=temperature, label_loss=label_loss)


def block_tokens_for(device: torch.device, vocab_size: int) -> int:
    """Tokens of one block, where the caller does not choose: by the device's kind and the
    vocabulary alone."""
    is_cpu = device.type == "cpu"
    most_tokens = _CPU_BLOCK_TOKENS if is_cpu else _GPU_BLOCK_TOKENS
    most_logits = _CPU_BLOCK_LOGITS if is_cpu else _GPU_BLOCK_LOGITS
    return max(1, min(most_tokens, most_logits // vocab_size))
