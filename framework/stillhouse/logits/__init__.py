"""Targets as values and as bytes: what a teacher's logits become, and what a student reads back."""

from stillhouse.logits.codec import decode, encode
from stillhouse.logits.compressed import CompressedLogits, Fidelity, concatenate, densify, fidelity
from stillhouse.logits.draws import token_seeds
from stillhouse.logits.head import Head
from stillhouse.logits.record import CODEC_VERSION, Codec
from stillhouse.logits.topk import compress, compress_hidden

__all__ = [
    "CODEC_VERSION",
    "Codec",
    "CompressedLogits",
    "Fidelity",
    "Head",
    "compress",
    "compress_hidden",
    "concatenate",
    "decode",
    "densify",
    "encode",
    "fidelity",
    "token_seeds",
]
