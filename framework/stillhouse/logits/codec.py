"""The target to bytes and back: one record of fixed size for each token, written and read where the
target or the record lies.

What a record is, `record` says. The same target gives the same bytes on every device, and the same
bytes the same ids in the same order.
"""

import torch
from torch import Tensor

from stillhouse.errors import ChunkError, ConfigError
from stillhouse.logits import codec_numpy, codec_torch
from stillhouse.logits.compressed import CompressedLogits
from stillhouse.logits.record import Codec


def encode(c: CompressedLogits, codec: Codec) -> Tensor:
    """Records of the target's tokens: uint8 [T, codec.bytes_per_token], on the target's device.

    Raises ConfigError when the target has another shape than the codec, ChunkError naming the first
    row that cannot be written.
    """
    found = (c.vocab_size, c.k, c.num_draws, c.temperature)
    wanted = (codec.vocab_size, codec.k, codec.num_draws, codec.temperature)
    if found != wanted:
        raise ConfigError(
            f"a target of (vocabulary, k, draws, temperature) = {found} meets a codec of "
            f"{wanted}; build both from one recipe"
        )
    return (
        codec_numpy.encode(c, codec)
        if c.token_ids_TK.device.type == "cpu"
        else codec_torch.encode(c, codec)
    )


def decode(records_TB: Tensor, codec: Codec) -> CompressedLogits:
    """The target that `records_TB` (uint8 [T, codec.bytes_per_token]) hold, on their device, by
    logprob descending, ties by id ascending.

    Raises ChunkError naming the first row that no encoder writes.
    """
    if (
        records_TB.dtype != torch.uint8
        or records_TB.ndim != 2
        or records_TB.shape[1] != codec.bytes_per_token
    ):
        raise ChunkError(
            f"records are {records_TB.dtype} {list(records_TB.shape)}, wanted uint8 [tokens, "
            f"{codec.bytes_per_token}] for {codec}; "
            "read them with the codec of their recipe"
        )
    return (
        codec_numpy.decode(records_TB, codec)
        if records_TB.device.type == "cpu"
        else codec_torch.decode(records_TB, codec)
    )
