"""Targets as values and as bytes: what a teacher's logits become, and what a student reads back."""

from stillhouse.logits.codec import Codec as Codec
from stillhouse.logits.codec import decode as decode
from stillhouse.logits.codec import encode as encode
from stillhouse.logits.compressed import CompressedLogits as CompressedLogits
from stillhouse.logits.compressed import concatenate as concatenate
from stillhouse.logits.head import Head as Head
