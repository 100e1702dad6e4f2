"""The codec: targets to records, one of fixed size for each token, and back, on any device.

`record` defines the bytes. The same target gives the same bytes on every device, and the same bytes
decode to the same ids in the same order.

Backends (`backend_for` chooses, and gives the reason):

    numpy   `codec_numpy`   the CPU
    triton  `codec_triton`  CUDA: one kernel each way, where there are not too many ids for it
    torch   `codec_torch`   every other device
"""

import logging
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from stillhouse.errors import ChunkError, ConfigError
from stillhouse.logits import codec_numpy, codec_torch
from stillhouse.logits.backend import Backend
from stillhouse.logits.compressed import CompressedLogits
from stillhouse.logits.spec import TargetSpec

_log = logging.getLogger(__name__)


def encode(compressed: CompressedLogits, spec: TargetSpec) -> Tensor:
    """Targets as records: uint8 [T, spec.bytes_per_token], on the targets' device.

    Raises ConfigError when the targets are not of `spec`, and ChunkError naming the first row that
    cannot be written.

        records_TB = encode(compress(logits_TV, spec), spec)
        compressed = decode(records_TB, spec)
    """
    found = (compressed.vocab_size, compressed.k, compressed.num_draws, compressed.temperature)
    wanted = (spec.vocab_size, spec.k, spec.num_draws, spec.temperature)
    if found != wanted:
        raise ConfigError(
            f"a target of (vocabulary, k, draws, temperature) = {found} meets a spec of "
            f"{wanted}; build both from one recipe"
        )
    held = tuple(
        tensor is not None
        for tensor in (
            compressed.draw_logprobs_TN,
            compressed.label_logprob_T,
            compressed.tail_entropy_T,
        )
    )
    asked = (spec.weighted, spec.label_logprob, spec.tail_entropy)
    if held != asked:
        raise ConfigError(
            f"a target with (draws' log-probabilities, label, tail entropy) = {held} meets a spec "
            f"of {asked}; build both from one recipe"
        )
    library = _library(backend_for(spec, compressed.tail_logmass_T.device))
    records_TB: Tensor = library.encode(compressed, spec)
    return records_TB


def decode(records_TB: Tensor, spec: TargetSpec) -> CompressedLogits:
    """The inverse of `encode`: targets from uint8 [T, spec.bytes_per_token], on the same device.

    Entries are by logprob descending, ties by id ascending. Ids are exact; log-probabilities are
    quantised to `spec.value_bits`. Raises ChunkError for records of another size, and naming the
    first row that no encoder writes.
    """
    shape, num_bytes = records_TB.shape, spec.bytes_per_token
    if records_TB.dtype != torch.uint8 or records_TB.ndim != 2 or shape[1] != num_bytes:
        raise ChunkError(
            f"records are {records_TB.dtype} {list(shape)}, wanted uint8 [tokens, {num_bytes}] for "
            f"{spec}; read them with the spec of their recipe"
        )
    library = _library(backend_for(spec, records_TB.device))
    compressed: CompressedLogits = library.decode(records_TB, spec)
    return compressed


@cache  # looking for triton at every call would show
def backend_for(spec: TargetSpec, device: torch.device) -> Backend:
    """The backend that `encode` and `decode` take for such targets on this device, and the reason.

    The first call for a GPU compiles the kernels and tests them, which takes seconds. Raises a
    failure of that test which may pass, such as too little memory; the next call tries again.
    """
    if device.type == "cpu":
        return Backend("numpy", "the targets are on the CPU")
    if device.type != "cuda":
        return Backend("torch", f"there are no kernels for {device.type}")
    why_not = _why_no_kernels(spec, device)
    if why_not:
        _log.warning("records are written and read by torch, not by one kernel: %s", why_not)
        return Backend("torch", why_not)
    return Backend("triton", f"its kernels passed their test on {device}")


def _why_no_kernels(spec: TargetSpec, device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    from stillhouse.logits import codec_triton

    return codec_triton.too_many(spec) or codec_triton.self_test_failure(device, spec)


def _library(backend: Backend) -> ModuleType:
    if backend.name == "triton":
        from stillhouse.logits import codec_triton

        return codec_triton
    return codec_numpy if backend.name == "numpy" else codec_torch
