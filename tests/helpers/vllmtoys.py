"""Toy teachers for vLLM, whose attention on the CPU needs heads of at least 32 numbers: one of each
architecture whose head or body is special; and items for them.

Shapes: S sequences, L positions.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from helpers.models import make_model
from stillhouse.config import TeacherSection, VllmSection
from stillhouse.engines.vllm import VllmEngine
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Recipe

VOCAB_SIZE = 300  # of the tokenizer; heads have 320 rows
S, L = 5, 96
_started: list[VllmEngine] = []  # one that is dropped would take the groups with it
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 16, "query_pre_attn_scalar": 32},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen3_moe": _EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": []},
}


def make_toy(folder: Path, architecture: str, **fields: Any) -> Path:
    """A random model with a head of 320 rows; a bias is not zero."""
    given = {
        "hidden_size": 64,
        "weight_std": 0.3,
        "tied": architecture in ("llama", "gemma2"),
    } | fields
    make_model(
        folder,
        architecture=architecture,
        vocab_size=320,
        tokenizer_vocab_size=VOCAB_SIZE,
        config=ARCHITECTURES[architecture],
        **given,
    )
    file = folder / "model.safetensors"
    weights = load_file(file)
    if "lm_head.bias" in weights:
        weights["lm_head.bias"].normal_(generator=torch.Generator().manual_seed(1))
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def started(section: TeacherSection, recipe: Recipe) -> VllmEngine:
    """An engine in this process, beside those that were started before: vLLM's groups of ranks,
    which a process has once, are made anew, since a mixture of experts needs one more."""
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()
    engine = VllmEngine(section, recipe, device="cpu")
    _started.append(engine)
    return engine


def section_of(folder: Path, *, dtype: str = "float32", **settings: Any) -> TeacherSection:
    """A teacher in little memory, whose head is computed in several blocks."""
    table = VllmSection(**({"kv_cache_gb": 0.05} | settings))
    return TeacherSection.model_validate(
        {
            "model": str(folder),
            "engine": "vllm",
            "dtype": dtype,
            "block_tokens": 64,
            "vllm": table.model_dump(),
        }
    )


def recipe_of(*, dtype: str = "float32", **changes: Any) -> Recipe:
    """A recipe with all that a target can hold."""
    given: dict[str, Any] = {
        "k": 8,
        "num_draws": 12,
        "weighted": True,
        "label_logprob": True,
        "tail_entropy": True,
    }
    return Recipe(
        corpus_digest="0" * 64,
        num_sequences=10 * S,
        sequence_length=L,
        packing="packed",
        chunk_sequences=S,
        tokenizer_digest="0" * 64,
        vocab_size=VOCAB_SIZE,
        teacher_digest="0" * 64,
        teacher_dtype=dtype,
        **(given | changes),
    )


@cache
def packed_item(number: int = 3) -> WorkItem:
    """Documents of many lengths, one of a single token, one without a target; a row without any;
    and all of them begin with the same tokens, which a prefix cache would find."""
    random = np.random.default_rng(number)
    ids_SL = random.integers(0, VOCAB_SIZE, (S, L), dtype=np.int32)
    mask_SL = (random.random((S, L)) < 0.7).astype(np.uint8)
    positions_SL = np.empty((S, L), np.int32)
    for row in range(S):
        inner = np.sort(random.choice(np.arange(2, L), row, replace=False))
        starts = [0, 1, *inner] if row == 2 else [0, *inner]
        lengths = np.diff([*starts, L])
        positions_SL[row] = np.concatenate([np.arange(length) for length in lengths])
        for start, length in zip(starts, lengths, strict=True):
            ids_SL[row, start : start + length] = ids_SL[0, :length]
            mask_SL[row, start + length - 1] = 0  # what follows is of another document
    mask_SL[1] = 0
    mask_SL[3, positions_SL[3].argmax() :] = 0
    return WorkItem(number, Sequences(ids_SL, positions_SL, mask_SL))
