"""Small recipes and chunks that are right in every field: what a teacher would publish, without a
teacher."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stillhouse.logits import CompressedLogits, TargetSpec, encode
from stillhouse.sequence import Sequences
from stillhouse.store import Chunk, Recipe


def small_recipe(**changes: Any) -> Recipe:
    """Ten sequences of 12 tokens in chunks of four, so that the third and last chunk has two; of
    format 1, unless `changes` has another."""
    values: dict[str, Any] = {
        "format": 1,
        "corpus_digest": "xxh3:corpus",
        "num_sequences": 10,
        "sequence_length": 12,
        "packing": "packed",
        "chunk_sequences": 4,
        "tokenizer_digest": "sha256:tokenizer",
        "vocab_size": 300,
        "teacher_digest": "sha256:teacher",
        "teacher_dtype": "float32",
        "k": 4,
        "num_draws": 0,
        "temperature": 1.0,
        "value_bits": 8,
    }
    return Recipe(**{**values, **changes})


def make_chunk(recipe: Recipe, number: int = 0, *, seed: int = 0) -> Chunk:
    """A chunk of random tokens and targets: packed documents of random lengths, the mask 1 inside
    them, never at their last token."""
    rng = np.random.default_rng([seed, number])
    shape = (len(recipe.chunk_rows(number)), recipe.sequence_length)
    starts_SL = rng.random(shape) < 0.2
    starts_SL[:, 0] = True
    columns_SL = np.broadcast_to(np.arange(shape[1]), shape)
    positions_SL = columns_SL - np.maximum.accumulate(np.where(starts_SL, columns_SL, 0), axis=1)
    loss_mask_SL = np.zeros(shape, np.uint8)
    loss_mask_SL[:, :-1] = ~starts_SL[:, 1:]
    token_ids_SL = rng.integers(0, recipe.vocab_size, shape)
    records = make_records(recipe.spec, int(loss_mask_SL.sum()), rng)
    return Chunk(
        number,
        Sequences(token_ids_SL.astype(np.int32), positions_SL.astype(np.int32), loss_mask_SL),
        records,
    )


def with_arrays(
    chunk: Chunk, *, targets_NB: np.ndarray | None = None, **arrays: np.ndarray
) -> Chunk:
    """The chunk with some of its arrays replaced."""
    return Chunk(
        chunk.number,
        replace(chunk.sequences, **arrays),
        chunk.targets_NB if targets_NB is None else targets_NB,
    )


def arrays_of(chunk: Chunk) -> dict[str, np.ndarray]:
    """By the names of its tensors; the hashes of its rows are left out."""
    return {
        "row_starts": chunk.row_starts,
        "positions": chunk.sequences.positions_SL,
        "token_ids": chunk.sequences.token_ids_SL,
        "loss_mask": chunk.sequences.loss_mask_SL,
        "targets": chunk.targets_NB,
    }


def make_records(spec: TargetSpec, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [num_tokens, spec.bytes_per_token]: the K likeliest of random logits, and random draws
    from the others."""
    logits_TV = torch.from_numpy(rng.normal(0, 3, (num_tokens, spec.vocab_size)).astype(np.float32))
    logprobs_TK, ids_TK = torch.log_softmax(logits_TV, dim=-1).topk(spec.k)
    tail_T = torch.log1p(-logprobs_TK.exp().sum(-1).clamp(max=1 - 1e-7))
    if spec.k == spec.vocab_size:
        tail_T.fill_(-torch.inf)
    draws_TN = torch.from_numpy(
        np.sort(rng.integers(0, spec.vocab_size, (num_tokens, spec.num_draws)), axis=1).astype(
            np.int32
        )
    )
    all_TV = torch.log_softmax(logits_TV, dim=-1)
    return encode(
        CompressedLogits(
            ids_TK.int(),
            logprobs_TK,
            tail_T,
            draws_TN,
            spec.vocab_size,
            spec.temperature,
            draw_logprobs_TN=all_TV.gather(1, draws_TN.long()) if spec.weighted else None,
            label_logprob_T=all_TV[:, 0].contiguous() if spec.label_logprob else None,
            tail_entropy_T=all_TV[:, -1].neg() if spec.tail_entropy else None,
        ),
        spec,
    ).numpy()
