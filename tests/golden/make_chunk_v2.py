"""Writes tests/golden/chunk_v2_weighted.{json,safetensors}: `PYTHONPATH=tests python
tests/golden/make_chunk_v2.py`. The random numbers are seeded."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from helpers.chunks import make_chunk, small_recipe
from stillhouse.logits import decode
from stillhouse.store import pack_chunk

RECIPE = small_recipe(
    format=2,
    num_sequences=3,
    sequence_length=6,
    chunk_sequences=2,
    vocab_size=50,
    k=2,
    num_draws=3,
    weighted=True,
    label_logprob=True,
    tail_entropy=True,
)
NUMBER = 1


def main() -> None:
    chunk = make_chunk(RECIPE, NUMBER)
    path = Path(__file__).with_name("chunk_v2_weighted.safetensors")
    path.write_bytes(pack_chunk(chunk, RECIPE))
    target = decode(torch.from_numpy(chunk.targets_NB), RECIPE.spec)
    tensors = {name: tensor.tolist() for name, tensor in target.tensors.items()}
    names = {
        "token_ids_TK": "ids",
        "logprobs_TK": "logprobs",
        "tail_logmass_T": "tail_logmass",
        "tail_ids_TN": "draws",
        "draw_logprobs_TN": "draw_logprobs",
        "label_logprob_T": "label_logprob",
        "tail_entropy_T": "tail_entropy",
    }
    targets = [
        {names[name]: values[row] for name, values in tensors.items()}
        for row in range(target.num_tokens)
    ]
    arrays = {
        "token_ids": chunk.sequences.token_ids_SL,
        "positions": chunk.sequences.positions_SL,
        "loss_mask": chunk.sequences.loss_mask_SL,
    }
    values = {
        "recipe": asdict(RECIPE),
        "number": NUMBER,
        **{name: np.asarray(array).tolist() for name, array in arrays.items()},
        "targets": targets,
    }
    path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
