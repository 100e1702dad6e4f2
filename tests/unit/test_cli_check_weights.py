"""`check` counts the bytes of a model's weights, also where they are quantised."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import make_model
from stillhouse.cli.check_weights import format_words, quantisation_of, weight_bytes
from stillhouse.config import TeacherSection
from stillhouse.models.load import load_model


def outline_with(folder: Path, quantisation: dict[str, Any] | None) -> Any:
    """A model whose files are quantised so, without memory for its weights."""
    make_model(folder, vocab_size=300, hidden_size=64, tied=False)
    config = folder / "config.json"
    if quantisation is not None:
        values = json.loads(config.read_text()) | {"quantization_config": quantisation}
        config.write_text(json.dumps(values))
    with torch.device("meta"):
        return load_model(TeacherSection(model=str(folder)), random_init_seed=0)


@pytest.mark.parametrize(
    ("quantisation", "bytes_inside", "words"),
    [
        (None, 2.0, "bfloat16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1.0, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128, "awq"),
        ({"quant_method": "unheard-of"}, 2.0, "bfloat16"),
    ],
)
def test_layers_are_counted_by_their_bits_and_embeddings_and_head_by_the_dtype(
    tmp_path: Path, quantisation: dict[str, Any] | None, bytes_inside: float, words: str
) -> None:
    lm = outline_with(tmp_path, quantisation)
    found = quantisation_of(lm)
    outside = 2 * 300 * 64
    inside = sum(each.numel() for each in lm.parameters()) - outside
    num_bytes = weight_bytes(lm, found, dtype_bytes=2)
    assert num_bytes == pytest.approx(outside * 2 + inside * bytes_inside)
    assert format_words(found, "bfloat16") == words


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    make_model(tmp_path, vocab_size=300, tied=True)
    lm = load_model(TeacherSection(model=str(tmp_path)), random_init_seed=0)
    assert weight_bytes(lm, {}, dtype_bytes=2) == 2 * sum(each.numel() for each in lm.parameters())
