"""Hugging Face causal language models, of teachers and students: tokenizer, identity, weights,
final hidden states and Head."""

from stillhouse.models.cuts import cut_model, write_cut
from stillhouse.models.files import require_whole_weights
from stillhouse.models.heads import check_head, check_packing, compare_head, final_hidden, head_of
from stillhouse.models.identity import ModelIdentity, digest_beside, forget_identity, model_identity
from stillhouse.models.load import load_model, resolve_device, save_model
from stillhouse.models.tokenizers import (
    check_same_ids,
    load_tokenizer,
    tokenizer_digest,
    vocab_size_of,
    vocabulary_digest,
)

__all__ = [
    "ModelIdentity",
    "check_head",
    "check_packing",
    "check_same_ids",
    "compare_head",
    "cut_model",
    "digest_beside",
    "final_hidden",
    "forget_identity",
    "head_of",
    "load_model",
    "load_tokenizer",
    "model_identity",
    "require_whole_weights",
    "resolve_device",
    "save_model",
    "tokenizer_digest",
    "vocab_size_of",
    "vocabulary_digest",
    "write_cut",
]
