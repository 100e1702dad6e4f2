"""Targets as values and as bytes: what a teacher's logits become, and what a student reads back.

compress, compress_hidden   logits, or hidden states and a head, to CompressedLogits
encode, decode              CompressedLogits to records of fixed size, and back
TargetSpec                  what a target holds, for all four
"""

from stillhouse.logits.backend import Backend
from stillhouse.logits.codec import decode, encode
from stillhouse.logits.compressed import (
    CompressedLogits,
    Fidelity,
    concatenate,
    fidelity,
    kept_mass,
)
from stillhouse.logits.head import Head
from stillhouse.logits.spec import TargetSpec
from stillhouse.logits.topk.dispatch import backend_for, compress, compress_hidden
from stillhouse.logits.topk.draws import token_seeds
from stillhouse.logits.topk.reference import compress_reference
from stillhouse.logits.topk.shards import compress_shard
from stillhouse.logits.weights import densify, draw_log_weights

__all__ = [
    "Backend",
    "CompressedLogits",
    "Fidelity",
    "Head",
    "TargetSpec",
    "backend_for",
    "compress",
    "compress_hidden",
    "compress_reference",
    "compress_shard",
    "concatenate",
    "decode",
    "densify",
    "draw_log_weights",
    "encode",
    "fidelity",
    "kept_mass",
    "token_seeds",
]
