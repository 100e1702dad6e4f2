"""Compressed logits: the target as a value, the kernels that make it, and the bytes that carry it."""

from stillhouse.logits.codec import CODEC_VERSION, Codec, decode, encode
from stillhouse.logits.compressed import CompressedLogits, Fidelity, concatenate, densify, fidelity
from stillhouse.logits.dispatch import Path, compress, compress_hidden, path_for
from stillhouse.logits.draws import token_seeds
from stillhouse.logits.head import Head
from stillhouse.logits.shards import compress_shard
from stillhouse.logits.topk import compress_reference

__all__ = [
    "CODEC_VERSION",
    "Codec",
    "CompressedLogits",
    "Fidelity",
    "Head",
    "Path",
    "compress",
    "compress_hidden",
    "compress_reference",
    "compress_shard",
    "concatenate",
    "decode",
    "densify",
    "encode",
    "fidelity",
    "path_for",
    "token_seeds",
]
