"""The codec: targets to records, one of fixed size for each token, and back, on any device.

`record` defines the bytes. The same target gives the same bytes on every device, and the same bytes
decode to the same ids in the same order.
"""

import torch
from torch import Tensor

from stillhouse.errors import ChunkError, ConfigError
from stillhouse.logits import codec_numpy, codec_torch
from stillhouse.logits.compressed import CompressedLogits
from stillhouse.logits.spec import TargetSpec


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
    library = codec_numpy if compressed.token_ids_TK.device.type == "cpu" else codec_torch
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
    library = codec_numpy if records_TB.device.type == "cpu" else codec_torch
    compressed: CompressedLogits = library.decode(records_TB, spec)
    return compressed
